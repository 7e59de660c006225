// Where everything of one side stands: a scene is flat arrays of boxes, and frames: the top scope, and one for each layer
// that is drawn. A folded run of layers has one frame, of the layer that is shown; an unfolded one has a frame a layer.

const BOX_HEIGHT = 20;
const FOLD_PADDING = 12;
const FOLD_HEADER = 24; // px, as in fuser/diff/document.py
const LAYER_GAP = 10;
const HULL = 7;
const LONGEST_LINK = 400; // a longer edge is no part of a hull

const boxWidth = (label) => Math.max(40, Math.min(200, 7 * label.length + 14));
const period = (scope) => scope.height + FOLD_HEADER + FOLD_PADDING + LAYER_GAP; // from one unfolded layer to the next

class Scene {
  constructor(diff, key) {
    this.diff = diff;
    this.side = diff[key];
    this.open = this.side.folds.map(() => false);
    this.shown = this.side.folds.map((fold) => fold.layers[0]);
    this.widths = Float32Array.from(this.side.nodes, (_, node) => boxWidth(this.side.label(node)));
    this.paths = new Map(); // edges of a scope, hulls of a layer: the same wherever they stand
    this.build();
  }

  build() {
    const { side } = this;
    const [top] = side.scopes;
    const frames = side.folds.map((_, fold) => this.drawn(fold));
    const size = top.places.length + frames.flat().reduce((sum, layer) => sum + side.members[layer].length, 0);
    this.x = new Float32Array(size).fill(NaN); // the centre
    this.y = new Float32Array(size).fill(NaN);
    this.node = new Int32Array(size).fill(-1);
    this.frame = new Int32Array(size); // which frame it stands in
    this.box = new Int32Array(side.nodes.length).fill(-1); // where a node is drawn, or one like it in a folded run
    this.size = 0;
    this.frames = [{ fold: -1, layer: -1, scope: top, x: 0, y: 0, first: 0 }];
    this.folds = [];
    this.setShifts(top);
    for (const [item, x, y] of top.places) {
      if (item >= 0) this.put(item, x, this.shifted(y));
      else this.putFold(-1 - item, x, y, frames[-1 - item]);
    }
    this.width = top.width;
    this.height = this.shifted(top.height);
    this.paths.delete("edges -1");
    this.paths.delete("hulls -1");
  }

  drawn(fold) {
    return this.open[fold] ? this.side.folds[fold].layers : [this.shown[fold]];
  }

  scope(fold) {
    return this.side.scopes[this.side.folds[fold].scope];
  }

  /** Unfolded layers push down what is below them. */
  setShifts(top) {
    this.shifts = [];
    for (const [item, , y] of top.places) {
      if (item >= 0 || !this.open[-1 - item]) continue;
      const scope = this.scope(-1 - item);
      const more = this.side.folds[-1 - item].layers.length - 1;
      this.shifts.push([y, more * period(scope)]);
    }
  }

  shifted(y) {
    return this.shifts.reduce((sum, [middle, extra]) => (y > middle ? sum + extra : sum), y);
  }

  put(node, x, y) {
    this.x[this.size] = x;
    this.y[this.size] = y;
    this.node[this.size] = node;
    this.box[node] = this.size++;
  }

  putFold(fold, x, y, layers) {
    const { side } = this;
    const scope = this.scope(fold);
    const left = x - scope.width / 2;
    const top = this.shifted(y) - (scope.height + FOLD_HEADER + FOLD_PADDING) / 2;
    layers.forEach((layer, number) => {
      const frame = { fold, layer, scope, x: left, y: top + FOLD_HEADER + number * period(scope), first: this.size };
      this.frames.push(frame);
      side.members[layer].forEach((node, position) => {
        this.node[frame.first + position] = node;
        this.box[node] = frame.first + position;
        this.frame[frame.first + position] = this.frames.length - 1;
      });
      for (const [position, px, py] of scope.places) {
        this.x[frame.first + position] = left + px;
        this.y[frame.first + position] = frame.y + py;
      }
      this.size += side.members[layer].length;
    });
    if (!this.open[fold]) this.standIn(fold);
    const bottom = this.frames.at(-1).y + scope.height + FOLD_PADDING;
    this.folds[fold] = { x: left - FOLD_PADDING, y: top, width: scope.width + 2 * FOLD_PADDING, height: bottom - top };
  }

  /** Nodes of the layers that are not drawn are found where their like in the shown layer is. */
  standIn(fold) {
    const { side } = this;
    const shown = side.members[this.shown[fold]];
    for (const layer of side.folds[fold].layers)
      side.members[layer].forEach((node, position) => (this.box[node] = this.box[shown[position]]));
  }

  /** An edge as x, y, x, y, ... in its frame. */
  points(frame, [from, to, bends]) {
    const middle = frame.fold < 0 ? bends.map((at, i) => (i % 2 ? this.shifted(at) : at)) : bends;
    const start = from === null ? null : this.end(frame, from, 1);
    const end = to === null ? null : this.end(frame, to, -1);
    return [
      ...(start ?? [middle[0] ?? end[0], 0]),
      ...middle,
      ...(end ?? [middle.at(-2) ?? start[0], frame.scope.height]),
    ];
  }

  /** Where edges leave an item (1) or reach it (-1). */
  end(frame, item, direction) {
    if (item < 0) {
      const { x, y, width, height } = this.folds[-1 - item];
      return [x + width / 2, direction > 0 ? y + height : y];
    }
    const box = frame.fold < 0 ? this.box[item] : frame.first + item;
    return [this.x[box] - frame.x, this.y[box] - frame.y + (direction * BOX_HEIGHT) / 2];
  }

  /** The node at an end of an edge; -1 where it is a whole run of layers or the border. */
  nodeOf(frame, item) {
    if (item === null || item < 0) return -1;
    return frame.fold < 0 ? item : this.side.members[frame.layer][item];
  }

  /** The edges of a frame as one path, in its coordinates. */
  edges(frame) {
    return this.cached(`edges ${frame.fold}`, () => {
      const path = new Path2D();
      for (const edge of frame.scope.edges) curve(path, this.points(frame, edge));
      return path;
    });
  }

  /** The hulls of a frame: for each region its boxes, and the edges between them. */
  hulls(frame) {
    return this.cached(`hulls ${frame.layer}`, () => {
      const hulls = new Map();
      const places = frame.scope.places.filter(([item]) => item >= 0);
      for (const node of places.map(([item]) => this.nodeOf(frame, item))) {
        for (const region of this.side.regions.get(node) ?? []) this.addToHull(hulls, region, node, frame);
      }
      for (const edge of frame.scope.edges) this.addLink(hulls, edge, frame);
      return [...hulls.values()];
    });
  }

  addToHull(hulls, region, node, frame) {
    if (!hulls.has(region)) {
      const { pattern } = this.diff.regions[region];
      hulls.set(region, { region, pattern, boxes: new Path2D(), links: new Path2D(), size: 0, x: 0, y: Infinity });
    }
    const hull = hulls.get(region);
    const { left, top, width } = this.bounds(this.box[node]);
    const x = left - frame.x;
    const y = top - frame.y;
    hull.boxes.roundRect(x - HULL, y - HULL, width + 2 * HULL, BOX_HEIGHT + 2 * HULL, HULL + 3);
    hull.size++;
    if (y < hull.y) Object.assign(hull, { x, y });
  }

  addLink(hulls, edge, frame) {
    const from = this.nodeOf(frame, edge[0]);
    const to = this.nodeOf(frame, edge[1]);
    const own = this.side.regions.get(from) ?? [];
    const shared = own.filter((one) => this.side.regions.get(to)?.includes(one));
    for (const region of shared) {
      const points = this.points(frame, edge);
      if (points.at(-1) - points[1] <= LONGEST_LINK) curve(hulls.get(region).links, points);
    }
  }

  cached(name, make) {
    if (!this.paths.has(name)) this.paths.set(name, make());
    return this.paths.get(name);
  }

  /** The left, the top and the width of a box. */
  bounds(box) {
    const width = this.widths[this.node[box]];
    return { left: this.x[box] - width / 2, top: this.y[box] - BOX_HEIGHT / 2, width };
  }

  /** The node whose box is at a place, or -1. */
  nodeAt(x, y) {
    for (let box = 0; box < this.size; box++) {
      const { left, top, width } = this.bounds(box);
      if (y >= top && y <= top + BOX_HEIGHT && x >= left && x <= left + width) return this.node[box];
    }
    return -1;
  }

  /** The run of layers whose header is at a place, or -1. */
  headerAt(x, y) {
    return this.folds.findIndex((fold) => {
      const across = fold && x >= fold.x && x <= fold.x + fold.width;
      return across && y >= fold.y && y <= fold.y + FOLD_HEADER;
    });
  }
}

/** Adds a line through points, vertical at each of them. */
function curve(path, points) {
  path.moveTo(points[0], points[1]);
  for (let i = 2; i < points.length; i += 2) {
    const [x0, y0, x1, y1] = [points[i - 2], points[i - 1], points[i], points[i + 1]];
    if (x0 === x1) path.lineTo(x1, y1);
    else path.bezierCurveTo(x0, (y0 + y1) / 2, x1, (y0 + y1) / 2, x1, y1);
  }
}
