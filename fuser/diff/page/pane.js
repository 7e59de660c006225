// One graph on a canvas. Only what is in view is drawn: from afar boxes without text, from near all of it.

const TEXT_FROM = 0.42, CHIPS_FROM = 0.6, SHAPES_FROM = 0.1; // scales at which text, small text and outlines begin
const LARGEST = 3, DRAG_FROM = 4, MINIMAP_WIDTH = 48;
const FONT = "system-ui, sans-serif";

/** The colours of the style sheet, which a canvas cannot take from there by itself. */
class Colours {
  constructor() {
    const style = getComputedStyle(document.documentElement);
    const names = "paper ground ink quiet line edge frame accent same removed added changed miss found removed-fill added-fill";
    for (const name of names.split(" ")) this[name] = style.getPropertyValue(`--${name}`).trim();
    for (const name of ["pale", "mid", "deep"]) this[name] = style.getPropertyValue(`--${name}`).trim();
  }

  /** A pattern's colour: hues a golden angle apart, as light and strong as the theme wants them. */
  of(pattern, tone) {
    return `oklch(${this[tone]} ${(255 + pattern * 137.5) % 360})`;
  }
}

class Pane {
  constructor(page, key) {
    this.page = page;
    this.key = key;
    this.side = page.diff[key];
    this.scene = new Scene(page.diff, key);
    this.figure = document.querySelector(`figure[data-side=${key}]`);
    this.canvas = this.figure.querySelector("canvas.graph");
    this.map = this.figure.querySelector("canvas.map");
    this.width = this.height = 0;
    this.view = { x: 0, y: 0, scale: 1 }; // the upper left corner in the scene, and px a unit
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.pointers = new Map();
    this.listen();
  }

  resize(size) {
    const stage = this.canvas.parentElement, { width, height } = size ?? { width: stage.clientWidth - MINIMAP_WIDTH, height: stage.clientHeight };
    this.ratio = Math.min(2, window.devicePixelRatio || 1) * (this.page.printing ? 2 : 1);
    this.width = Math.max(0, width);
    this.height = height;
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(height * this.ratio);
    this.drawMap();
    this.invalidate();
  }

  invalidate() {
    this.request ??= requestAnimationFrame(() => {
      this.request = undefined;
      this.draw();
    });
  }

  // The view.

  /** The scale at which all is seen. */
  get smallest() {
    return Math.min(1, (this.width - 16) / this.scene.width, (this.height - 16) / this.scene.height);
  }

  setView(x, y, scale) {
    if (!this.width) return;
    scale = Math.max(this.smallest * 0.8, Math.min(LARGEST, scale));
    const width = this.width / scale, height = this.height / scale;
    this.view = { scale, x: within(x, width, this.scene.width), y: within(y, height, this.scene.height) };
    this.invalidate();
  }

  fit() {
    const { scene, width, height, smallest: scale } = this;
    this.setView((scene.width - width / scale) / 2, (scene.height - height / scale) / 2, scale);
  }

  /** The first layers, or all where there are none. */
  get beginning() {
    return this.scene.folds[0] ?? { x: 0, width: this.scene.width };
  }

  /** The scale at which their width is seen, and can be read. */
  get readable() {
    return Math.min(1, Math.max(0.6, (this.width - 24) / this.beginning.width));
  }

  start(scale) {
    const { x, width } = this.beginning;
    this.setView(x + (width - this.width / scale) / 2, -20, scale);
  }

  zoom(factor, px = this.width / 2, py = this.height / 2) {
    const { x, y, scale } = this.view, next = Math.max(this.smallest * 0.8, Math.min(LARGEST, scale * factor));
    this.setView(x + px / scale - px / next, y + py / scale - py / next, next);
    this.page.follow(this);
  }

  pan(dx, dy) {
    const { x, y, scale } = this.view;
    this.setView(x + dx / scale, y + dy / scale, scale);
    this.page.follow(this);
  }

  /** Brings nodes into view, slowly where that is welcome; of those far apart the most that can be read at once. */
  reveal(nodes, wanted = Math.max(this.view.scale, 0.8)) {
    const { x, y, box } = this.scene, found = nodes.map((node) => box[node]).filter((one) => one >= 0).sort((a, b) => y[a] - y[b]);
    if (!found.length || !this.width) return;
    const most = (this.height - 80) / TEXT_FROM, wide = (this.width - 80) / TEXT_FROM;
    const windows = found.map((first) => found.filter((one) => y[one] >= y[first] && y[one] - y[first] <= most && Math.abs(x[one] - x[first]) <= wide));
    const boxes = windows.reduce((best, one) => (one.length > best.length ? one : best));
    const xs = boxes.map((one) => x[one]), [top, bottom] = [y[boxes[0]] - 40, y[boxes.at(-1)] + 40];
    const [left, right] = [Math.min(...xs) - 110, Math.max(...xs) + 110];
    const scale = Math.max(TEXT_FROM, Math.min(wanted, this.width / (right - left), this.height / (bottom - top)));
    this.glide({ scale, x: (left + right - this.width / scale) / 2, y: (top + bottom - this.height / scale) / 2 });
  }

  glide(to) {
    const from = this.view, began = performance.now(), token = (this.gliding = {});
    if (this.page.still) return this.setView(to.x, to.y, to.scale);
    const step = (now) => {
      if (this.gliding !== token) return;
      const part = Math.min(1, Math.max(0, (now - began) / 220)), ease = part * (2 - part);
      const mix = (name) => from[name] + (to[name] - from[name]) * ease;
      this.setView(mix("x"), mix("y"), mix("scale"));
      if (part < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  // Drawing.

  draw() {
    if (!this.width) return;
    const { context: c, ratio, view, page } = this, { scale } = view;
    this.colours = page.colours;
    this.seen = { left: view.x, top: view.y, right: view.x + this.width / scale, bottom: view.y + this.height / scale };
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.fillStyle = this.colours.paper;
    c.fillRect(0, 0, this.canvas.width, this.canvas.height);
    c.setTransform(ratio * scale, 0, 0, ratio * scale, -view.x * ratio * scale, -view.y * ratio * scale);
    const frames = this.scene.frames.filter((frame) => frame.y - FOLD_HEADER < this.seen.bottom && frame.y + frame.scope.height + FOLD_PADDING > this.seen.top || frame.fold < 0);
    this.drawFolds(c, frames, scale);
    for (const frame of frames) this.inFrame(c, frame, () => this.drawFrame(c, frame, scale));
    this.drawBoxes(c, scale);
    if (scale >= TEXT_FROM) for (const frame of frames) this.inFrame(c, frame, () => this.drawHullNames(c, frame));
    this.drawHighlights(c, scale);
    this.drawView();
    page.drawn(this);
  }

  inFrame(c, frame, draw) {
    c.save();
    c.translate(frame.x, frame.y);
    draw();
    c.restore();
  }

  drawFolds(c, frames, scale) {
    const { scene, side, colours } = this;
    for (const { fold, layer, scope, x, y } of frames) {
      if (fold < 0) continue;
      c.fillStyle = colours.frame;
      c.beginPath();
      c.roundRect(x - FOLD_PADDING, y - FOLD_HEADER, scope.width + 2 * FOLD_PADDING, scope.height + FOLD_HEADER + FOLD_PADDING, 10);
      c.fill();
      if (scale < TEXT_FROM * 0.7) continue;
      const { label, layers } = side.folds[fold], own = clip(side.layers[layer].label, 40), open = scene.open[fold];
      const run = layers.length > 1 && (!open || layer === layers[0]) ? `${open ? "▾" : "▸"}  ${clip(label, 40)}  × ${layers.length}` : "";
      c.font = `600 11px ${FONT}`;
      c.fillStyle = colours.ink;
      c.fillText(run, x, y - 8, scope.width);
      const taken = run ? c.measureText(run).width + 12 : 0;
      c.font = `11px ${FONT}`;
      c.fillStyle = colours.quiet;
      if (taken + 60 < scope.width) c.fillText(own, x + taken, y - 8, scope.width - taken);
    }
  }

  drawFrame(c, frame, scale) {
    const scene = this.scene;
    if (scale >= SHAPES_FROM) for (const hull of scene.hulls(frame)) this.drawHull(c, hull);
    if (scale < SHAPES_FROM / 2) return; // thinner than what can be seen
    c.strokeStyle = this.colours.edge;
    c.lineWidth = Math.max(1, 0.6 / scale);
    c.globalAlpha = scale < SHAPES_FROM * 2 ? 0.6 : 1;
    c.stroke(scene.edges(frame));
    c.globalAlpha = 1;
  }

  /** Fills over strokes of the same shape: what boxes and edges make together has one outline. */
  drawHull(c, { region, pattern, boxes, links, size }) {
    if (this.key === "after" && size < 2) return; // the box itself is coloured
    const lit = this.page.lit.regions.has(region), faint = this.page.chosen >= 0 && this.page.chosen !== pattern;
    c.lineJoin = c.lineCap = "round";
    for (const [tone, grow] of [["mid", lit ? 2.5 : 1], ["pale", 0]]) {
      c.fillStyle = c.strokeStyle = faint ? (grow ? this.colours.line : this.colours.ground) : this.colours.of(pattern, tone);
      c.lineWidth = 18 + 2 * grow;
      c.stroke(links);
      c.fill(boxes);
      c.lineWidth = 2 * grow;
      if (grow) c.stroke(boxes);
    }
  }

  drawHullNames(c, frame) {
    if (this.key === "after") return;
    const taken = []; // where names are: of two at one place the first is drawn
    c.font = `600 10px ${FONT}`;
    c.lineWidth = 3;
    c.lineJoin = "round";
    c.strokeStyle = frame.fold < 0 ? this.colours.paper : this.colours.frame;
    for (const { pattern, x, y } of this.scene.hulls(frame)) {
      const name = clip(this.page.diff.patterns[pattern].name, 40), end = x + c.measureText(name).width + 4;
      if (taken.some((other) => other.y === y && x < other.end && end > other.x)) continue;
      taken.push({ x, y, end });
      c.fillStyle = this.colours.of(pattern, "deep");
      c.strokeText(name, x - HULL + 2, y - HULL - 4);
      c.fillText(name, x - HULL + 2, y - HULL - 4);
    }
  }

  /** What a box looks like: its fill, its outline, whether that is dashed, and its colour from afar. */
  look(node) {
    const { colours: k, page, side } = this, status = side.status[node], pattern = page.diff.pattern(this.key, node);
    if (page.chosen >= 0 && page.chosen !== pattern) return [k.paper, k.line, false, k.line];
    if (status === FUSED) return [this.key === "after" ? k.of(pattern, "pale") : k.paper, k.of(pattern, "deep"), false, k.of(pattern, "mid")];
    if (status === CHANGED) return [k.paper, k.changed, false, k.changed];
    if (status === SAME) return [k.same, k.line, false, k.edge];
    return this.key === "before" ? [k["removed-fill"], k.removed, true, k.removed] : [k["added-fill"], k.added, false, k.added];
  }

  /** The looks by status and pattern: made once a theme, read for each box. */
  lookOf(node) {
    const number = this.side.status[node] * 1024 + this.page.diff.pattern(this.key, node) + 1;
    return (this.looks[number] ??= this.look(node));
  }

  drawBoxes(c, scale) {
    const { scene, seen } = this, { x, y, node, size, widths } = scene;
    const near = scale >= SHAPES_FROM, least = 1.2 / scale, height = Math.max(BOX_HEIGHT, least), visible = [];
    this.looks = [];
    let last = null;
    for (let box = 0; box < size; box++) {
      if (!(y[box] > seen.top - 30 && y[box] < seen.bottom + 30)) continue;
      const width = widths[node[box]], left = x[box] - width / 2;
      if (left > seen.right || left + width < seen.left) continue;
      if (near) visible.push(box);
      const look = this.lookOf(node[box]), colour = look[near ? 0 : 3];
      if (colour !== last) c.fillStyle = last = colour;
      if (near) this.drawBox(c, box, look, scale);
      else c.fillRect(left, y[box] - height / 2, Math.max(width, least), height);
    }
    if (scale >= TEXT_FROM) this.drawTexts(c, visible);
    if (scale >= CHIPS_FROM) this.drawChips(c, visible);
    if (near) for (const box of visible) if (this.side.misses.has(node[box])) this.drawMiss(c, box);
  }

  drawBox(c, box, [, outline, dashed], scale) {
    const width = this.scene.widths[this.scene.node[box]], x = this.scene.x[box] - width / 2, y = this.scene.y[box] - BOX_HEIGHT / 2;
    c.beginPath();
    if (scale >= TEXT_FROM) c.roundRect(x, y, width, BOX_HEIGHT, 5);
    else c.rect(x, y, width, BOX_HEIGHT);
    c.fill();
    c.strokeStyle = outline;
    c.lineWidth = Math.max(1, 0.7 / scale);
    if (dashed && scale >= TEXT_FROM) c.setLineDash([4, 3]);
    c.stroke();
    if (dashed) c.setLineDash([]);
  }

  drawTexts(c, boxes) {
    const { scene, side, colours } = this;
    c.textAlign = "center";
    c.textBaseline = "middle";
    c.font = `12px ${FONT}`;
    c.fillStyle = colours.ink;
    for (const box of boxes) {
      const node = scene.node[box];
      c.fillText(side.label(node), scene.x[box], scene.y[box] + 0.5, scene.widths[node] - 8);
    }
    c.textAlign = "left";
    c.textBaseline = "alphabetic";
  }

  drawChips(c, boxes) {
    c.font = `9px ${FONT}`;
    for (const box of boxes) if (this.side.chips(this.scene.node[box]).length) this.drawChip(c, box);
  }

  /** The values that a node reads from afar, as a label at its upper left corner. */
  drawChip(c, box) {
    const { scene, side, colours } = this, node = scene.node[box];
    const room = scene.widths[node] + 6, names = [...new Set(side.chips(node))].map((value) => clip(side.values[value][0], 24));
    const text = clip(names.join(" · "), Math.floor(room / 5)), width = Math.min(room, c.measureText(text).width + 10);
    const x = scene.x[box] - scene.widths[node] / 2 - 3, y = scene.y[box] - BOX_HEIGHT / 2 - 8;
    c.fillStyle = colours.paper;
    c.strokeStyle = colours.edge;
    c.lineWidth = 1;
    c.beginPath();
    c.roundRect(x, y, width, 12, 6);
    c.fill();
    c.stroke();
    c.fillStyle = colours.quiet;
    c.fillText(text, x + 5, y + 9, width - 10);
  }

  drawMiss(c, box) {
    const { scene, colours } = this, x = scene.x[box] + scene.widths[scene.node[box]] / 2, y = scene.y[box] - BOX_HEIGHT / 2;
    c.fillStyle = colours.miss;
    c.beginPath();
    c.arc(x, y, 7, 0, 7);
    c.fill();
    c.fillStyle = colours.paper;
    c.font = `700 10px ${FONT}`;
    c.textAlign = "center";
    c.fillText("!", x, y + 3.5);
    c.textAlign = "left";
  }

  drawHighlights(c, scale) {
    const { page, scene } = this, { lit } = page;
    for (const node of page.matches[this.key]) this.ring(c, node, this.colours.found, 2 / Math.min(1, scale), 3);
    for (const node of lit[this.key]) this.ring(c, node, this.colours.accent, 2 / Math.min(1, scale), 2);
    const selected = page.selected?.side === this.key ? page.selected.node : -1;
    if (selected < 0) return;
    this.ring(c, selected, this.colours.accent, 3.5 / Math.min(1, scale), 2.5);
    const box = scene.box[selected], frame = scene.frames[scene.frame[box]];
    if (!frame || scale < SHAPES_FROM) return;
    const item = frame.fold < 0 ? selected : box - frame.first;
    const own = frame.scope.edges.filter(([from, to]) => from === item || to === item);
    this.inFrame(c, frame, () => {
      const path = new Path2D();
      for (const edge of own) curve(path, scene.points(frame, edge));
      c.strokeStyle = this.colours.accent;
      c.lineWidth = 2;
      c.stroke(path);
    });
  }

  ring(c, node, colour, width, away) {
    const { scene } = this, box = scene.box[node];
    if (box < 0 || !(scene.y[box] > this.seen.top - 30 && scene.y[box] < this.seen.bottom + 30)) return;
    const wide = scene.widths[scene.node[box]];
    c.strokeStyle = colour;
    c.lineWidth = width;
    c.beginPath();
    c.roundRect(scene.x[box] - wide / 2 - away, scene.y[box] - BOX_HEIGHT / 2 - away, wide + 2 * away, BOX_HEIGHT + 2 * away, 7);
    c.stroke();
  }

  // The map: all of the scene in a strip, and where the view is in it.

  drawMap() {
    const { scene, ratio, map } = this, height = Math.max(1, this.height);
    map.width = MINIMAP_WIDTH * ratio;
    map.height = height * ratio;
    map.style.width = `${MINIMAP_WIDTH}px`;
    map.style.height = `${height}px`;
    this.strip = document.createElement("canvas"); // what is under the view's frame, drawn once
    this.strip.width = map.width;
    this.strip.height = map.height;
    const c = this.strip.getContext("2d"), sx = map.width / scene.width, sy = map.height / scene.height;
    this.colours = this.page.colours;
    this.looks = [];
    c.fillStyle = this.colours.ground;
    c.fillRect(0, 0, map.width, map.height);
    c.fillStyle = this.colours.paper;
    for (const { x, y, width, height } of scene.folds.filter(Boolean)) c.fillRect(x * sx, y * sy, width * sx, height * sy);
    for (let box = 0; box < scene.size; box++) {
      const node = scene.node[box], width = scene.widths[node];
      c.fillStyle = this.lookOf(node)[3];
      c.fillRect((scene.x[box] - width / 2) * sx, (scene.y[box] - BOX_HEIGHT / 2) * sy, Math.max(1, width * sx), Math.max(1, BOX_HEIGHT * sy));
    }
  }

  drawView() {
    const { map, scene, view } = this, c = map.getContext("2d");
    const sx = map.width / scene.width, sy = map.height / scene.height;
    c.drawImage(this.strip, 0, 0);
    c.strokeStyle = this.colours.accent;
    c.lineWidth = 1.5 * this.ratio;
    const width = Math.min(map.width - 3, (this.width / view.scale) * sx), height = Math.max(4, (this.height / view.scale) * sy);
    c.strokeRect(Math.max(1.5, Math.min(map.width - width - 1.5, view.x * sx)), view.y * sy, width, Math.min(height, map.height));
  }

  // The pointer.

  listen() {
    const { canvas, map } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 16 : 1, speed = event.ctrlKey ? 0.01 : 0.0015;
      if (event.shiftKey) this.pan(event.deltaX * lines, event.deltaY * lines);
      else this.zoom(Math.exp(-event.deltaY * lines * speed), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.page.hover(null));
    const jump = (event) => {
      if (!event.buttons) return;
      const x = (event.offsetX / MINIMAP_WIDTH) * this.scene.width, y = (event.offsetY / map.clientHeight) * this.scene.height;
      this.setView(x - this.width / this.view.scale / 2, y - this.height / this.view.scale / 2, this.view.scale);
      this.page.follow(this);
    };
    map.addEventListener("pointerdown", jump);
    map.addEventListener("pointermove", jump);
  }

  press(event) {
    this.gliding = null;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.dragged = this.pointers.size > 1 ? DRAG_FROM : 0;
  }

  move(event) {
    const { offsetX: x, offsetY: y } = event, last = this.pointers.get(event.pointerId);
    if (!last) return this.point(x, y);
    if (this.pointers.size === 2) this.pinch(event.pointerId, last, [x, y]);
    this.dragged += Math.abs(x - last[0]) + Math.abs(y - last[1]);
    this.pointers.set(event.pointerId, [x, y]);
    if (this.dragged < DRAG_FROM) return;
    this.canvas.classList.add("dragging");
    this.pan((last[0] - x) / this.pointers.size, (last[1] - y) / this.pointers.size);
  }

  pinch(pointer, last, now) {
    const [, still] = [...this.pointers].find(([id]) => id !== pointer);
    const apart = (at) => Math.max(10, Math.hypot(at[0] - still[0], at[1] - still[1]));
    this.zoom(apart(now) / apart(last), (now[0] + still[0]) / 2, (now[1] + still[1]) / 2);
  }

  release(event) {
    const held = this.pointers.delete(event.pointerId);
    this.canvas.classList.remove("dragging");
    if (held && this.dragged < DRAG_FROM) this.click(event);
  }

  toScene(x, y) {
    return [this.view.x + x / this.view.scale, this.view.y + y / this.view.scale];
  }

  point(x, y) {
    const box = this.scene.boxAt(...this.toScene(x, y)), node = box < 0 ? -1 : this.scene.node[box];
    this.canvas.classList.toggle("over", node >= 0 || this.scene.headerAt(...this.toScene(x, y)) >= 0);
    this.page.hover(node < 0 ? null : { side: this.key, node });
  }

  click(event) {
    const at = this.toScene(event.offsetX, event.offsetY), box = this.scene.boxAt(...at), fold = this.scene.headerAt(...at);
    if (box >= 0) this.page.select({ side: this.key, node: this.scene.node[box] });
    else if (fold >= 0) this.page.toggle(this.key, fold, event.shiftKey);
    else this.page.select(null);
  }
}

/** A corner such that some of what there is stays in what is seen. */
function within(corner, seen, all) {
  return Math.max(-0.9 * seen, Math.min(all - 0.1 * seen, corner));
}
