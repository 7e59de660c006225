// One graph: where one looks at it from, and what the pointer does there.

const LARGEST = 3;
const DRAG_FROM = 4;
const GLIDE_MS = 220;

class Pane {
  constructor(page, key) {
    this.page = page;
    this.key = key;
    this.side = page.diff[key];
    this.scene = new Scene(page.diff, key);
    this.figure = document.querySelector(`figure[data-side=${key}]`);
    this.canvas = this.figure.querySelector("canvas.graph");
    this.stage = this.canvas.parentElement;
    this.width = this.height = 0;
    this.ratio = 1;
    this.view = { x: 0, y: 0, scale: 1 }; // the upper left corner in the scene, and px a unit
    this.painter = new Painter(this);
    this.map = new Minimap(this);
    this.pointers = new Map();
    this.listen();
  }

  /** Takes the room that there is, or the width and height in px that are given. */
  resize({ width, height } = { width: this.stage.clientWidth - MINIMAP_WIDTH, height: this.stage.clientHeight }) {
    this.ratio = Math.min(2, window.devicePixelRatio || 1) * (this.page.printing ? 2 : 1);
    this.width = Math.max(0, width);
    this.height = height;
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(height * this.ratio);
    this.map.drawScene();
    this.invalidate();
  }

  invalidate() {
    this.request ??= requestAnimationFrame(() => {
      this.request = undefined;
      this.draw();
    });
  }

  draw() {
    if (!this.width) return;
    this.painter.draw();
    this.map.drawView();
    this.page.drawn();
  }

  // The view.

  /** The scale at which all is seen. */
  get smallest() {
    return Math.min(1, (this.width - 16) / this.scene.width, (this.height - 16) / this.scene.height);
  }

  /** The first layers, or all where there are none. */
  get beginning() {
    return this.scene.folds[0] ?? { x: 0, width: this.scene.width };
  }

  /** The scale at which their width is seen, and can be read. */
  get readable() {
    return Math.min(1, Math.max(0.6, (this.width - 24) / this.beginning.width));
  }

  get middle() {
    const { x, y, scale } = this.view;
    return [x + this.width / scale / 2, y + this.height / scale / 2];
  }

  allowed(scale) {
    return Math.max(this.smallest * 0.8, Math.min(LARGEST, scale));
  }

  /** Some of what there is stays in view. */
  setView(x, y, scale) {
    if (!this.width) return;
    scale = this.allowed(scale);
    const within = (corner, seen, all) => Math.max(-0.9 * seen, Math.min(all - 0.1 * seen, corner));
    x = within(x, this.width / scale, this.scene.width);
    y = within(y, this.height / scale, this.scene.height);
    this.view = { x, y, scale };
    this.invalidate();
  }

  centre(x, y, scale) {
    scale = this.allowed(scale);
    this.setView(x - this.width / scale / 2, y - this.height / scale / 2, scale);
  }

  fit() {
    this.centre(this.scene.width / 2, this.scene.height / 2, this.smallest);
  }

  start(scale) {
    const { x, width } = this.beginning;
    this.setView(x + (width - this.width / scale) / 2, -20, scale);
  }

  zoom(factor, px = this.width / 2, py = this.height / 2) {
    const { x, y, scale } = this.view;
    const next = this.allowed(scale * factor);
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
    const boxes = this.near(nodes.map((node) => this.scene.box[node]).filter((box) => box >= 0));
    if (!boxes.length || !this.width) return;
    const { x, y } = this.scene;
    const xs = boxes.map((box) => x[box]);
    const ys = boxes.map((box) => y[box]);
    const [left, right] = [Math.min(...xs) - 110, Math.max(...xs) + 110];
    const [top, bottom] = [Math.min(...ys) - 40, Math.max(...ys) + 40];
    const scale = Math.max(TEXT_FROM, Math.min(wanted, this.width / (right - left), this.height / (bottom - top)));
    this.glide({ scale, x: (left + right - this.width / scale) / 2, y: (top + bottom - this.height / scale) / 2 });
  }

  /** Of some boxes the most that are seen together at a scale at which they can be read. */
  near(boxes) {
    const { x, y } = this.scene;
    const high = (this.height - 80) / TEXT_FROM;
    const wide = (this.width - 80) / TEXT_FROM;
    const below = (first) => (box) => {
      const down = y[box] - y[first];
      return down >= 0 && down <= high && Math.abs(x[box] - x[first]) <= wide;
    };
    return boxes.map((first) => boxes.filter(below(first))).reduce((a, b) => (b.length > a.length ? b : a), []);
  }

  glide(to) {
    const from = this.view;
    const began = performance.now();
    const token = (this.gliding = {});
    if (this.page.still) return this.setView(to.x, to.y, to.scale);
    const step = (now) => {
      if (this.gliding !== token) return;
      const part = Math.min(1, Math.max(0, (now - began) / GLIDE_MS));
      const ease = part * (2 - part);
      const mix = (name) => from[name] + (to[name] - from[name]) * ease;
      this.setView(mix("x"), mix("y"), mix("scale"));
      if (part < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  // The pointer.

  listen() {
    const { canvas } = this;
    const on = (kind, act) => canvas.addEventListener(kind, act, { passive: false });
    on("wheel", (event) => this.wheel(event));
    on("pointerdown", (event) => this.press(event));
    on("pointermove", (event) => this.move(event));
    on("pointerup", (event) => this.release(event));
    on("pointercancel", (event) => this.pointers.delete(event.pointerId));
    on("pointerleave", () => this.page.hover(null));
  }

  wheel(event) {
    event.preventDefault();
    const unit = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
    const speed = event.ctrlKey ? 0.01 : 0.0015; // a pinch on a touchpad comes as a wheel with the control key
    if (event.shiftKey) this.pan(event.deltaX * unit, event.deltaY * unit);
    else this.zoom(Math.exp(-event.deltaY * unit * speed), event.offsetX, event.offsetY);
  }

  press(event) {
    this.gliding = null;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.dragged = this.pointers.size > 1 ? DRAG_FROM : 0;
  }

  move(event) {
    const { offsetX: x, offsetY: y } = event;
    const last = this.pointers.get(event.pointerId);
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
    const at = this.toScene(x, y);
    const node = this.scene.nodeAt(...at);
    this.canvas.classList.toggle("over", node >= 0 || this.scene.headerAt(...at) >= 0);
    this.page.hover(node < 0 ? null : { side: this.key, node });
  }

  click(event) {
    const at = this.toScene(event.offsetX, event.offsetY);
    const node = this.scene.nodeAt(...at);
    const fold = this.scene.headerAt(...at);
    if (node >= 0) this.page.select({ side: this.key, node });
    else if (fold >= 0) this.page.toggle(this.key, fold, event.shiftKey);
    else this.page.select(null);
  }
}
