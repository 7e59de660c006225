// Two graphs as one: where one shows what the other shows.

class Linking {
  constructor({ before, after }, diff) {
    this.panes = { before, after };
    this.diff = diff;
    this.on = true;
  }

  /** To be called when layers were folded or unfolded. */
  forget() {
    this.anchors = null;
  }

  /** Moves the other graph to where it shows the same. */
  follow(pane) {
    const other = this.panes[opposite(pane.key)];
    other.gliding = null;
    other.centre(other.middle[0], this.across(pane, pane.middle[1]), pane.view.scale);
  }

  /** Moves `to` so that it has at the same place what `from` has of what is marked, or in the middle. */
  replace(from, to, lit) {
    const place = ({ scene }, node) => [scene.x[scene.box[node]], scene.y[scene.box[node]]];
    const both = lit[from.key].length && lit[to.key].length;
    const middle = from.middle;
    const [x, y] = both ? place(from, lit[from.key][0]) : middle;
    const at = both ? place(to, lit[to.key][0]) : [to.scene.width / 2, this.across(from, middle[1])];
    to.setView(at[0] - (x - from.view.x), at[1] - (y - from.view.y), from.view.scale);
  }

  /** The height in the other graph that goes with one in this: between places that are known to be the same. */
  across(pane, y) {
    this.anchors ??= this.findAnchors();
    const [from, to] = pane.key === "before" ? [0, 1] : [1, 0];
    const points = this.anchors;
    const next = Math.max(
      1,
      points.findIndex((point) => point[from] >= y),
    );
    const [a, b] = [points[next - 1], points[next]];
    return a[to] + (b[from] > a[from] ? ((y - a[from]) / (b[from] - a[from])) * (b[to] - a[to]) : 0);
  }

  /** Heights before and after of what is in layers; what is in none may be drawn anywhere. */
  findAnchors() {
    const before = this.panes.before.scene;
    const after = this.panes.after.scene;
    const points = [];
    for (const [box, node] of after.node.entries()) {
      const sources = this.diff.related("after", node, "before").filter((one) => before.side.position[one] >= 0);
      const inLayer = after.frames[after.frame[box]].fold >= 0;
      if (inLayer && sources.length)
        points.push([Math.min(...sources.map((one) => before.y[before.box[one]])), after.y[box]]);
    }
    points.sort((a, b) => a[1] - b[1]);
    for (let i = 1; i < points.length; i++) points[i][0] = Math.max(points[i][0], points[i - 1][0]);
    return [[0, 0], ...points, [before.height, after.height]];
  }
}
