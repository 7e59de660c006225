// The page: what is selected, shown and searched, and what the keys do.

const PRINTED = { width: 336, height: 660 }; // px of a graph on paper
const PAN = 60, ZOOM = 1.25;

class Page {
  constructor(diff) {
    this.diff = diff;
    this.mode = "both";
    this.linked = true;
    this.selected = this.hovered = null;
    this.chosen = -1; // a pattern that alone is coloured
    this.lit = { before: [], after: [], regions: new Set() };
    this.matches = { before: [], after: [] };
    this.found = [];
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
    this.colours = new Colours();
    this.swatches = []; // [element, pattern]
    this.panes = { before: new Pane(this, "before"), after: new Pane(this, "after") };
    showSummary(this);
    showLegend(this);
    showList(this);
    this.details = new Details(this, document.querySelector("#details"));
    this.outline = new Outline(this, document.querySelector("#tree"));
    this.details.show(null);
    this.listen();
    dark.addEventListener("change", () => this.setTheme(dark.matches));
    for (const pane of Object.values(this.panes)) {
      this.showFolds(pane);
      new ResizeObserver(() => this.resized(pane)).observe(pane.canvas.parentElement);
    }
  }

  resized(pane) {
    if (this.printing || !pane.canvas.parentElement.clientWidth) return; // hidden: as it was, when it is shown again
    const first = !pane.width;
    pane.resize();
    if (first && pane.width) this.start();
  }

  /** The beginning of what is shown, in both graphs at one scale. */
  start() {
    const panes = this.shownPanes.filter((pane) => pane.width), scale = Math.min(...panes.map((pane) => pane.readable));
    for (const pane of panes) pane.start(scale);
  }

  redraw() {
    for (const pane of Object.values(this.panes)) pane.invalidate();
  }

  drawn() {
    if (!window.fuserDiff.frames++) window.fuserDiff.opened = performance.now();
  }

  get shownPanes() {
    return SIDES.filter((key) => this.mode === key || this.mode === "both").map((key) => this.panes[key]);
  }

  // What is selected.

  hover(entry) {
    if (entry?.side === this.hovered?.side && entry?.node === this.hovered?.node) return;
    this.hovered = entry;
    this.light();
  }

  /** Marks what is hovered or else selected, on both sides. */
  light() {
    const entry = this.hovered ?? this.selected;
    for (const key of SIDES) this.lit[key] = entry ? this.diff.related(entry.side, entry.node, key) : [];
    this.lit.regions = new Set(entry ? this.diff[entry.side].regions.get(entry.node) : []);
    this.redraw();
  }

  /** Selects a node; what was clicked on stays where it is, and the rest comes into view. */
  select(entry, { from = null } = {}) {
    this.selected = entry;
    this.hovered = null;
    this.light();
    this.details.show(entry);
    this.outline.show(entry);
    if (!entry) return;
    if (this.mode !== "both" && this.mode !== entry.side && !this.lit[this.mode]?.length) this.setMode(entry.side);
    const scale = Math.max(0.8, this.panes[entry.side].view.scale);
    for (const pane of this.shownPanes) {
      const nodes = pane.key === entry.side ? [...this.lit[pane.key], entry.node] : this.lit[pane.key];
      this.showLayers(pane, nodes);
      if (from || pane.key !== entry.side) pane.reveal(nodes, scale);
    }
  }

  /** In a folded run of layers, the layer of the nodes is the one to show. */
  showLayers(pane, nodes) {
    const { side, scene } = pane;
    for (const layer of nodes.map((node) => side.nodes[node][LAYER]).filter((layer) => layer >= 0)) {
      const { fold } = side.layers[layer];
      if (scene.open[fold] || scene.shown[fold] === layer) continue;
      scene.shown[fold] = layer;
      this.rebuild(pane);
    }
  }

  revealAll(leaves) {
    for (const pane of this.shownPanes) {
      const nodes = leaves.flatMap(([key, node]) => (key === pane.key ? [node] : this.diff.related(key, node, pane.key)));
      this.showLayers(pane, nodes.slice(0, 1));
      pane.reveal(nodes);
    }
  }

  /** What a node is, in words. */
  state(key, node) {
    const side = this.diff[key], alone = key === "before" ? "removed" : "added";
    const name = side.status[node] === FUSED ? this.diff.patterns[this.diff.pattern(key, node)].name : "";
    const word = ["unchanged", "changed", key === "before" ? `fused into ${clip(name, 60)}` : "fused", alone][side.status[node]];
    return side.misses.has(node) ? `${word}, near miss` : word;
  }

  swatch(key, node) {
    const status = this.diff[key].status[node];
    if (status === FUSED) return this.patternSwatch(this.diff.pattern(key, node));
    return make("span", { className: `swatch ${["", "changed", "", key === "before" ? "removed" : "added"][status]}` });
  }

  patternSwatch(pattern) {
    return this.paint(make("span", { className: "swatch" }), pattern);
  }

  paint(swatch, pattern) {
    swatch.pattern = pattern;
    swatch.style.background = this.colours.of(pattern, "pale");
    swatch.style.borderColor = this.colours.of(pattern, "deep");
    return swatch;
  }

  /** Shows one pattern alone in colour, and goes to its first fusion; -1 for all. */
  choosePattern(pattern) {
    this.chosen = pattern;
    for (const button of document.querySelectorAll("#legend button")) button.ariaPressed = `${button.pattern === pattern}`;
    this.redraw();
    if (pattern >= 0) this.stepFusion(0);
  }

  /** The next fusion (1) or the one before (-1), of the chosen pattern if there is one. */
  stepFusion(step) {
    const all = this.diff.regions.filter(({ pattern, after }) => after.length && (this.chosen < 0 || pattern === this.chosen));
    const order = all.map(({ after }) => after[0]).sort((a, b) => a - b);
    const now = this.selected ? this.diff.related(this.selected.side, this.selected.node, "after")[0] : -1;
    const at = step > 0 ? order.findIndex((node) => node > now) : step < 0 ? order.findLastIndex((node) => node < now) : 0;
    if (order.length) this.select({ side: "after", node: order.at(at < 0 ? (step > 0 ? 0 : -1) : at) }, { from: this });
  }

  // Search.

  search(text) {
    this.found = this.diff.search(text);
    this.at = -1;
    for (const key of SIDES) this.matches[key] = this.found.filter(([side]) => side === key).map(([, node]) => node);
    this.showFound(text);
    this.redraw();
  }

  stepFound(step) {
    if (!this.found.length) return;
    this.at = (this.at < 0 ? (step > 0 ? 0 : this.found.length - 1) : this.at + step + this.found.length) % this.found.length;
    const [side, node] = this.found[this.at];
    this.select({ side, node }, { from: this });
    this.showFound(" ");
  }

  showFound(text) {
    const all = this.found.length;
    document.querySelector("#found").textContent = all ? (this.at < 0 ? count(all, "match").replace("matchs", "matches") : `${this.at + 1} of ${all}`) : text.trim() ? "no match" : "";
  }

  // Layers.

  rebuild(pane) {
    pane.scene.build();
    pane.map.drawScene();
    this.anchors = null;
    pane.invalidate();
  }

  /** Unfolds or folds one run of layers; in both graphs where that is asked for. */
  toggle(key, fold, both = false) {
    const open = !this.panes[key].scene.open[fold], label = this.diff[key].folds[fold].label;
    for (const pane of both ? Object.values(this.panes) : [this.panes[key]]) {
      const same = pane.key === key ? fold : pane.side.folds.findIndex((one) => one.label === label);
      if (same >= 0) this.setOpen(pane, same, open);
    }
  }

  unfold(open, panes = Object.values(this.panes)) {
    for (const pane of panes) pane.side.folds.forEach(({ layers }, fold) => layers.length > 1 && this.setOpen(pane, fold, open));
  }

  setOpen(pane, fold, open) {
    if (pane.scene.open[fold] === open) return;
    pane.scene.open[fold] = open;
    this.rebuild(pane);
    this.showFolds(pane);
    const { x, y, scale } = pane.view;
    pane.setView(x, y, scale); // what was in view may be no more
  }

  isOpen(pane) {
    return pane.scene.open.some(Boolean);
  }

  showFolds(pane) {
    const { side } = pane, repeated = side.folds.filter(({ layers }) => layers.length > 1).reduce((sum, { layers }) => sum + layers.length, 0);
    const button = pane.figure.querySelector(".fold"), open = this.isOpen(pane);
    button.hidden = !repeated;
    button.ariaExpanded = `${open}`;
    button.textContent = open ? `Fold ${repeated} layers` : `Unfold ${repeated} layers`;
    pane.figure.querySelector(".about").textContent = count(side.nodes.length, "operator");
    pane.canvas.ariaLabel = `${clip(side.name, 80)}, ${pane.key}: ${count(side.nodes.length, "operator")}; ${repeated} repeated layers, ${open ? "unfolded" : "folded"}. The outline lists all.`;
    const every = Object.values(this.panes ?? {}).every((one) => this.isOpen(one));
    document.querySelector("#unfold").ariaPressed = `${every}`;
  }

  // Views.

  setMode(mode) {
    this.mode = document.body.dataset.mode = mode;
    for (const button of document.querySelectorAll("#toolbar [data-mode]")) button.ariaPressed = `${button.dataset.mode === mode}`;
    for (const pane of this.shownPanes) this.resized(pane); // now, not when the observer tells
  }

  /** One graph in the place of the other; what is selected stays at its place. */
  flip() {
    const from = this.panes[this.mode === "after" ? "after" : "before"], to = this.panes[opposite(from.key)];
    if (this.mode === "both" || this.mode === "list") return this.setMode("before");
    const [box] = this.lit[from.key].map((node) => from.scene.box[node]);
    const y = box >= 0 ? from.scene.y[box] : from.view.y + from.height / from.view.scale / 2;
    const x = box >= 0 ? from.scene.x[box] : from.view.x + from.width / from.view.scale / 2;
    const [twin] = this.lit[to.key].map((node) => to.scene.box[node]);
    const at = twin >= 0 && box >= 0 ? [to.scene.x[twin], to.scene.y[twin]] : [to.scene.width / 2, this.across(from, y)];
    this.setMode(to.key);
    to.setView(at[0] - (x - from.view.x), at[1] - (y - from.view.y), from.view.scale);
  }

  /** Moves the other graph to where it shows the same. */
  follow(pane) {
    if (!this.linked || this.mode !== "both") return;
    const other = this.panes[opposite(pane.key)], { scale } = pane.view;
    const x = other.view.x + other.width / other.view.scale / 2;
    const y = this.across(pane, pane.view.y + pane.height / scale / 2);
    other.gliding = null;
    other.setView(x - other.width / scale / 2, y - other.height / scale / 2, scale);
  }

  /** The height in the other graph that goes with one in this: between places that are known to be the same. */
  across(pane, y) {
    this.anchors ??= this.findAnchors();
    const from = pane.key === "before" ? 0 : 1, to = 1 - from, points = this.anchors;
    const next = Math.max(1, points.findIndex((point) => point[from] >= y));
    const [a, b] = [points[next - 1], points[next]];
    return a[to] + (b[from] > a[from] ? ((y - a[from]) / (b[from] - a[from])) * (b[to] - a[to]) : 0);
  }

  findAnchors() {
    const { before, after } = this.panes, points = [];
    for (let box = 0; box < after.scene.size; box++) {
      if (after.scene.frames[after.scene.frame[box]].fold < 0) continue; // in no layer: what shares work is spread out
      const sources = this.diff.related("after", after.scene.node[box], "before").filter((node) => before.side.position[node] >= 0);
      const ys = sources.map((node) => before.scene.y[before.scene.box[node]]);
      if (ys.length) points.push([Math.min(...ys), after.scene.y[box]]);
    }
    points.sort((a, b) => a[1] - b[1]);
    for (let i = 1; i < points.length; i++) points[i][0] = Math.max(points[i][0], points[i - 1][0]);
    return [[0, 0], ...points, [before.scene.height, after.scene.height]];
  }

  setTheme(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.querySelector("#theme").textContent = dark ? "Light" : "Dark";
    this.colours = new Colours();
    for (const swatch of document.querySelectorAll(".swatch")) if (swatch.pattern >= 0) this.paint(swatch, swatch.pattern);
    for (const pane of Object.values(this.panes)) pane.resize();
  }

  get dark() {
    return document.documentElement.dataset.theme === "dark";
  }

  // Paper: light, folded, whole.

  startPrint() {
    this.kept = { dark: this.dark, open: SIDES.map((key) => [...this.panes[key].scene.open]) };
    this.printing = true;
    this.setTheme(false);
    this.unfold(false);
    for (const pane of Object.values(this.panes)) {
      const { style } = pane.canvas.parentElement;
      [style.width, style.height] = [`${PRINTED.width}px`, `${PRINTED.height}px`];
      pane.kept = pane.view;
      pane.resize(PRINTED);
      pane.fit();
      pane.draw(); // before the paper is, which waits for no frame
    }
  }

  endPrint() {
    this.printing = false;
    for (const pane of Object.values(this.panes)) {
      const { style } = pane.canvas.parentElement;
      style.width = style.height = "";
      pane.side.folds.forEach((_, fold) => this.setOpen(pane, fold, this.kept.open[SIDES.indexOf(pane.key)][fold]));
      pane.resize();
      pane.view = pane.kept;
    }
    this.setTheme(this.kept.dark);
  }

  // Keys and buttons.

  listen() {
    const on = (id, act) => document.querySelector(id).addEventListener("click", act);
    for (const button of document.querySelectorAll("#toolbar [data-mode]")) button.addEventListener("click", () => this.setMode(button.dataset.mode));
    for (const pane of Object.values(this.panes))
      pane.figure.querySelector(".fold").addEventListener("click", () => this.unfold(!this.isOpen(pane), [pane]));
    on("#unfold", () => this.unfold(document.querySelector("#unfold").ariaPressed !== "true"));
    on("#fit", () => this.fit());
    on("#theme", () => this.setTheme(!this.dark));
    on("#keys", () => document.querySelector("#help").showModal());
    on("#fusion-next", () => this.stepFusion(1));
    on("#fusion-previous", () => this.stepFusion(-1));
    on("#previous", () => this.stepFound(-1));
    on("#link", (event) => {
      this.linked = !this.linked;
      event.currentTarget.ariaPressed = `${this.linked}`;
    });
    document.querySelector("#query").addEventListener("input", (event) => this.search(event.target.value));
    document.querySelector("#query").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.shiftKey) {
        event.preventDefault();
        this.stepFound(-1);
      }
    });
    document.querySelector("#search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.stepFound(1);
    });
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("beforeprint", () => this.startPrint());
    addEventListener("afterprint", () => this.endPrint());
    this.setMode("both");
  }

  fit() {
    for (const pane of this.shownPanes) pane.fit();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("#help").open) return;
    if (event.key === "Escape") return this.clear();
    if (event.target.matches("input")) return;
    const pane = Object.values(this.panes).find(({ canvas }) => canvas === event.target);
    const act = this.pageKeys[event.key] ?? (pane && this.paneKeys(pane)[event.key]);
    if (!act) return;
    event.preventDefault();
    act();
  }

  get pageKeys() {
    const all = (act) => () => (this.linked ? this.shownPanes.slice(0, 1) : this.shownPanes).forEach(act);
    const zoomIn = all((pane) => pane.zoom(ZOOM)), zoomOut = all((pane) => pane.zoom(1 / ZOOM));
    return {
      "/": () => document.querySelector("#query").select(),
      "?": () => document.querySelector("#help").showModal(),
      ".": () => this.stepFusion(1), ",": () => this.stepFusion(-1),
      1: () => this.setMode("both"), 2: () => this.setMode("before"), 3: () => this.setMode("after"), 4: () => this.setMode("list"),
      x: () => this.flip(), d: () => this.setTheme(!this.dark), e: () => document.querySelector("#unfold").click(),
      0: () => this.fit(), "+": zoomIn, "=": zoomIn, "-": zoomOut,
    };
  }

  paneKeys(pane) {
    return {
      ArrowLeft: () => pane.pan(-PAN, 0), ArrowRight: () => pane.pan(PAN, 0), ArrowUp: () => pane.pan(0, -PAN), ArrowDown: () => pane.pan(0, PAN),
      PageUp: () => pane.pan(0, -0.8 * pane.height), PageDown: () => pane.pan(0, 0.8 * pane.height),
      Enter: () => this.unfold(!this.isOpen(pane), [pane]),
    };
  }

  clear() {
    document.querySelector("#query").value = "";
    this.search("");
    this.choosePattern(-1);
    this.select(null);
  }
}

// What tests ask: how many graphs were drawn, when the first was (ms since the page was asked for), and the page itself.
window.fuserDiff = { frames: 0 };
window.fuserDiff.page = new Page(new Diff(JSON.parse(document.getElementById("document").textContent)));
