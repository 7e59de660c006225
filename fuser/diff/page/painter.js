// Draws a scene on a canvas. Only what is in view is drawn: from afar boxes without text, from near all of it.

const TEXT_FROM = 0.42;
const CHIPS_FROM = 0.6;
const SHAPES_FROM = 0.1; // scales at which text, small text and outlines begin
const FONT = "system-ui, sans-serif";

/** The colours of the style sheet, which a canvas cannot take from there by itself. */
class Colours {
  constructor() {
    const style = getComputedStyle(document.documentElement);
    const names = "paper ground ink quiet line edge frame accent same removed added changed miss found pale mid deep";
    for (const name of names.split(" ")) this[name] = style.getPropertyValue(`--${name}`).trim();
    this.fills = { removed: style.getPropertyValue("--removed-fill"), added: style.getPropertyValue("--added-fill") };
  }

  /** A pattern's colour: hues a golden angle apart, as light and strong as the theme wants them. */
  of(pattern, tone) {
    return `oklch(${this[tone]} ${(255 + pattern * 137.5) % 360})`;
  }
}

class Painter {
  constructor(pane) {
    this.pane = pane;
    this.page = pane.page;
    this.side = pane.side;
    this.scene = pane.scene;
    this.context = pane.canvas.getContext("2d", { alpha: false });
    this.refresh();
  }

  /** To be called when the theme or what is chosen has changed. */
  refresh() {
    this.colours = this.page.colours;
    this.looks = new Map();
  }

  draw() {
    const { context: c, pane, scene } = this;
    const { ratio, view } = pane;
    const { x, y, scale } = view;
    this.scale = scale;
    this.seen = { left: x, top: y, right: x + pane.width / scale, bottom: y + pane.height / scale };
    this.refresh();
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.fillStyle = this.colours.paper;
    c.fillRect(0, 0, pane.canvas.width, pane.canvas.height);
    c.setTransform(ratio * scale, 0, 0, ratio * scale, -x * ratio * scale, -y * ratio * scale);
    const frames = scene.frames.filter((frame) => this.isSeen(frame));
    const near = scale >= TEXT_FROM;
    for (const frame of frames) if (frame.fold >= 0) this.drawFold(c, frame);
    for (const frame of frames) this.inFrame(c, frame, () => this.drawFrame(c, frame));
    const visible = this.drawBoxes(c);
    if (near && pane.key === "before")
      for (const frame of frames) this.inFrame(c, frame, () => this.nameHulls(c, frame));
    this.drawHighlights(c);
    if (scale >= CHIPS_FROM) this.drawChips(c, visible);
    for (const box of visible) if (this.side.misses.has(scene.node[box])) this.drawMiss(c, box);
    if (near) this.drawPlace(c, frames);
  }

  /** Where the header of a layer is out of view, what layer it is. */
  drawPlace(c, frames) {
    const { left, top } = this.seen;
    const above = frames.find(({ fold, y, scope }) => fold >= 0 && y < top && y + scope.height > top + 60);
    if (!above) return;
    const { scope, x } = above;
    const unit = 1 / this.scale;
    const from = Math.max(left, x - FOLD_PADDING) + 8 * unit;
    if (from > x + scope.width) return;
    c.font = `600 ${11 * unit}px ${FONT}`;
    const text = clip(this.side.layers[above.layer].label, 40);
    const width = c.measureText(text).width + 16 * unit;
    c.fillStyle = this.colours.paper;
    c.strokeStyle = this.colours.line;
    c.lineWidth = unit;
    this.fillRound(c, from, top + 8 * unit, width, 20 * unit, 6 * unit);
    c.stroke();
    c.fillStyle = this.colours.ink;
    c.fillText(text, from + 8 * unit, top + 22 * unit);
  }

  isSeen({ fold, y, scope }) {
    if (fold < 0) return true;
    return y - FOLD_HEADER < this.seen.bottom && y + scope.height + FOLD_PADDING > this.seen.top;
  }

  inFrame(c, frame, draw) {
    c.save();
    c.translate(frame.x, frame.y);
    draw();
    c.restore();
  }

  fillRound(c, x, y, width, height, radius) {
    c.beginPath();
    c.roundRect(x, y, width, height, radius);
    c.fill();
  }

  /** The ground of a layer, with what it is in its header. */
  drawFold(c, { fold, layer, scope, x, y }) {
    const { side, scene, colours } = this;
    const { label, layers } = side.folds[fold];
    const open = scene.open[fold];
    const height = scope.height + FOLD_HEADER + FOLD_PADDING;
    c.fillStyle = colours.frame;
    this.fillRound(c, x - FOLD_PADDING, y - FOLD_HEADER, scope.width + 2 * FOLD_PADDING, height, 10);
    if (this.scale < TEXT_FROM * 0.7) return;
    const first = layers.length > 1 && (!open || layer === layers[0]);
    const run = first ? `${open ? "▾" : "▸"}  ${clip(label, 40)}  × ${layers.length}` : "";
    c.font = `600 11px ${FONT}`;
    c.fillStyle = colours.ink;
    c.fillText(run, x, y - 8, scope.width);
    const taken = run ? c.measureText(run).width + 12 : 0;
    c.font = `11px ${FONT}`;
    c.fillStyle = colours.quiet;
    if (taken + 60 < scope.width) c.fillText(clip(side.layers[layer].label, 40), x + taken, y - 8, scope.width - taken);
  }

  drawFrame(c, frame) {
    if (this.scale >= SHAPES_FROM) for (const hull of this.scene.hulls(frame)) this.drawHull(c, hull);
    if (this.scale < SHAPES_FROM / 2) return; // edges are thinner than what can be seen
    c.strokeStyle = this.colours.edge;
    c.lineWidth = Math.max(1, 0.6 / this.scale);
    c.stroke(this.scene.edges(frame));
  }

  /** Fills over strokes of the same shape: what boxes and edges make together has one outline. */
  drawHull(c, { region, pattern, boxes, links, size }) {
    if (this.pane.key === "after" && size < 2) return; // the box itself is coloured
    const { page, colours } = this;
    const faint = page.chosen >= 0 && page.chosen !== pattern;
    const grow = page.lit.regions.has(region) ? 2.5 : 1;
    c.lineJoin = c.lineCap = "round";
    const pass = (colour, wide) => {
      c.fillStyle = c.strokeStyle = colour;
      c.lineWidth = 18 + 2 * wide;
      c.stroke(links);
      c.fill(boxes);
      c.lineWidth = 2 * wide;
      if (wide) c.stroke(boxes);
    };
    pass(faint ? colours.line : colours.of(pattern, "mid"), grow);
    pass(faint ? colours.ground : colours.of(pattern, "pale"), 0);
  }

  nameHulls(c, frame) {
    const taken = []; // where names are: of two at one place the first is drawn
    c.font = `600 10px ${FONT}`;
    c.lineWidth = 3;
    c.lineJoin = "round";
    c.strokeStyle = frame.fold < 0 ? this.colours.paper : this.colours.frame;
    for (const { pattern, x, y } of this.scene.hulls(frame)) {
      const name = clip(this.page.diff.patterns[pattern].name, 40);
      const end = x + c.measureText(name).width + 4;
      if (taken.some((other) => other.y === y && x < other.end && end > other.x)) continue;
      taken.push({ x, y, end });
      c.fillStyle = this.colours.of(pattern, "deep");
      c.strokeText(name, x - HULL + 2, y - HULL - 4);
      c.fillText(name, x - HULL + 2, y - HULL - 4);
    }
  }

  /** What a box looks like, and its one colour from afar: the same for all of one status and pattern. */
  lookOf(node) {
    const pattern = this.page.diff.pattern(this.pane.key, node);
    const number = this.side.status[node] + 4 * (pattern + 1);
    if (!this.looks.has(number)) this.looks.set(number, this.look(this.side.status[node], pattern));
    return this.looks.get(number);
  }

  look(status, pattern) {
    const { colours: k, page, pane } = this;
    const after = pane.key === "after";
    const alone = after ? "added" : "removed";
    if (page.chosen >= 0 && page.chosen !== pattern) return { fill: k.paper, line: k.line, afar: k.line };
    if (status === CHANGED) return { fill: k.paper, line: k.changed, afar: k.changed };
    if (status === SAME) return { fill: k.same, line: k.line, afar: k.edge };
    if (status === ALONE) return { fill: k.fills[alone], line: k[alone], dashed: !after, afar: k[alone] };
    const [pale, mid, deep] = ["pale", "mid", "deep"].map((tone) => k.of(pattern, tone));
    return { fill: after ? pale : k.paper, line: deep, afar: mid };
  }

  /** Draws them and gives those that are near enough to have more on them. */
  drawBoxes(c) {
    const { scene, seen, scale } = this;
    const near = scale >= SHAPES_FROM;
    const least = 1.2 / scale;
    const visible = [];
    for (let box = 0; box < scene.size; box++) {
      const { left, top, width } = scene.bounds(box);
      if (!(top > seen.top - 40 && top < seen.bottom + 20) || left > seen.right || left + width < seen.left) continue;
      const look = this.lookOf(scene.node[box]);
      c.fillStyle = near ? look.fill : look.afar;
      if (near) this.drawBox(c, left, top, width, look);
      else c.fillRect(left, top, Math.max(width, least), Math.max(BOX_HEIGHT, least));
      if (near) visible.push(box);
    }
    if (scale >= TEXT_FROM) this.drawTexts(c, visible);
    return visible;
  }

  drawBox(c, left, top, width, { line, dashed }) {
    const near = this.scale >= TEXT_FROM;
    c.beginPath();
    if (near) c.roundRect(left, top, width, BOX_HEIGHT, 5);
    else c.rect(left, top, width, BOX_HEIGHT);
    c.fill();
    c.strokeStyle = line;
    c.lineWidth = Math.max(1, 0.7 / this.scale);
    if (dashed && near) c.setLineDash([4, 3]);
    c.stroke();
    if (dashed) c.setLineDash([]);
  }

  drawTexts(c, boxes) {
    const { scene, side } = this;
    c.textAlign = "center";
    c.font = `12px ${FONT}`;
    c.fillStyle = this.colours.ink;
    for (const box of boxes) {
      const node = scene.node[box];
      c.fillText(side.label(node), scene.x[box], scene.y[box] + 4, scene.widths[node] - 8);
    }
    c.textAlign = "left";
  }

  drawChips(c, boxes) {
    c.font = `9px ${FONT}`;
    for (const box of boxes) {
      const values = this.side.chips(this.scene.node[box]);
      if (values.length) this.drawChip(c, this.scene.bounds(box), values);
    }
  }

  /** The values that a node reads from afar, as a label at its upper left corner. */
  drawChip(c, { left, top, width }, values) {
    const { side, colours } = this;
    const room = width + 6;
    const names = [...new Set(values)].map((value) => clip(side.values[value][0], 24)).join(" · ");
    const text = clip(names, Math.floor(room / 5));
    const wide = Math.min(room, c.measureText(text).width + 10);
    c.fillStyle = colours.paper;
    c.strokeStyle = colours.edge;
    c.lineWidth = 1;
    this.fillRound(c, left - 3, top - 8, wide, 12, 6);
    c.stroke();
    c.fillStyle = colours.quiet;
    c.fillText(text, left + 2, top + 1, wide - 10);
  }

  drawMiss(c, box) {
    const { left, top, width } = this.scene.bounds(box);
    c.fillStyle = this.colours.miss;
    c.beginPath();
    c.arc(left + width, top, 7, 0, 7);
    c.fill();
    c.fillStyle = this.colours.paper;
    c.font = `700 10px ${FONT}`;
    c.textAlign = "center";
    c.fillText("!", left + width, top + 3.5);
    c.textAlign = "left";
  }

  /** Rings around what was searched, what is marked and what is selected, whose edges are marked too. */
  drawHighlights(c) {
    const { page, pane, colours } = this;
    const pixel = 1 / Math.min(1, this.scale);
    for (const node of page.matches[pane.key]) this.ring(c, node, colours.found, 2 * pixel, 3);
    for (const node of page.lit[pane.key]) this.ring(c, node, colours.accent, 2 * pixel, 2);
    if (page.selected?.side !== pane.key) return;
    this.ring(c, page.selected.node, colours.accent, 3.5 * pixel, 2.5);
    if (this.scale >= SHAPES_FROM) this.drawOwnEdges(c, this.scene.box[page.selected.node]);
  }

  drawOwnEdges(c, box) {
    const { scene } = this;
    const frame = scene.frames[scene.frame[box]];
    if (!frame) return;
    const item = frame.fold < 0 ? scene.node[box] : box - frame.first;
    const path = new Path2D();
    for (const edge of frame.scope.edges) {
      if (edge[0] === item || edge[1] === item) curve(path, scene.points(frame, edge));
    }
    this.inFrame(c, frame, () => {
      c.strokeStyle = this.colours.accent;
      c.lineWidth = 2;
      c.stroke(path);
    });
  }

  ring(c, node, colour, line, away) {
    const box = this.scene.box[node];
    if (box < 0) return;
    const { left, top, width } = this.scene.bounds(box);
    if (!(top > this.seen.top - 40 && top < this.seen.bottom + 20)) return;
    c.strokeStyle = colour;
    c.lineWidth = line;
    c.beginPath();
    c.roundRect(left - away, top - away, width + 2 * away, BOX_HEIGHT + 2 * away, 7);
    c.stroke();
  }
}
