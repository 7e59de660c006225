// The page: what is selected, shown and searched, and what the keys do.

const PRINTED = { width: 336, height: 660 }; // px of a graph on paper
const PAN = 60;
const ZOOM = 1.25;
const find = (selector) => document.querySelector(selector);

class Page {
  constructor(diff) {
    this.diff = diff;
    this.mode = "both";
    this.selected = this.hovered = null; // { side, node }
    this.chosen = -1; // a pattern that alone is coloured
    this.lit = { before: [], after: [], regions: new Set() };
    this.found = [];
    this.matches = { before: [], after: [] };
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.darkness = matchMedia("(prefers-color-scheme: dark)");
    document.documentElement.dataset.theme = this.darkness.matches ? "dark" : "light";
    this.colours = new Colours();
    this.panes = { before: new Pane(this, "before"), after: new Pane(this, "after") };
    this.all = Object.values(this.panes);
    this.linking = new Linking(this.panes, diff);
    showSummary(this);
    showLegend(this);
    showList(this);
    this.details = new Details(this, find("#details"));
    this.outline = new Outline(this, find("#tree"));
    this.details.show(null);
    this.listen();
    this.setTheme(this.darkness.matches);
    this.setMode("both");
    for (const pane of this.all) {
      this.showFolds(pane);
      new ResizeObserver(() => this.resized(pane)).observe(pane.stage);
    }
  }

  resized(pane) {
    if (this.printing || !pane.stage.clientWidth) return; // hidden: as it was, when it is shown again
    const first = !pane.width;
    pane.resize();
    if (first) this.start();
  }

  /** The beginning of what is shown, in both graphs at one scale. */
  start() {
    const panes = this.shown.filter((pane) => pane.width);
    const scale = Math.min(...panes.map((pane) => pane.readable));
    for (const pane of panes) pane.start(scale);
  }

  redraw() {
    for (const pane of this.all) pane.invalidate();
  }

  drawn() {
    if (!window.fuserDiff.frames++) window.fuserDiff.opened = performance.now();
  }

  get shown() {
    return this.all.filter(({ key }) => this.mode === key || this.mode === "both");
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

  /** Selects a node. Its own graph, where it was clicked on, stays; the other shows what goes with it, or `everywhere`. */
  select(entry, { everywhere = false } = {}) {
    this.selected = entry;
    this.hovered = null;
    this.light();
    this.details.show(entry);
    this.outline.show(entry);
    if (!entry) return;
    const { side, node } = entry;
    const scale = Math.max(0.8, this.panes[side].view.scale);
    if (this.mode !== "both" && this.mode !== side && !this.lit[this.mode]?.length) this.setMode(side);
    for (const pane of this.shown) {
      const nodes = pane.key === side ? [...this.lit[side], node] : this.lit[pane.key];
      this.showLayers(pane, nodes);
      if (everywhere || pane.key !== side) pane.reveal(nodes, scale);
    }
  }

  /** In a folded run of layers, the layer of the nodes, or of most of them, is the one to show. */
  showLayers(pane, nodes) {
    const { side, scene } = pane;
    const layers = new Map();
    for (const node of nodes) addTo(layers, side.nodes[node][LAYER], node);
    for (const [layer] of [...layers].sort((a, b) => a[1].length - b[1].length)) {
      const fold = side.layers[layer]?.fold ?? -1;
      if (fold < 0 || scene.open[fold] || scene.shown[fold] === layer) continue;
      scene.shown[fold] = layer;
      this.rebuild(pane);
    }
  }

  /** Brings what is in a module into view, without selecting any of it. */
  revealAll(leaves) {
    for (const pane of this.shown) {
      const nodes = leaves.flatMap(([key, node]) => this.diff.related(key, node, pane.key));
      this.showLayers(pane, nodes.slice(0, 1));
      pane.reveal(nodes);
    }
  }

  /** What a node is, in words. */
  state(key, node) {
    const { status, misses } = this.diff[key];
    const pattern = this.diff.patterns[this.diff.pattern(key, node)];
    const words = {
      [SAME]: "unchanged",
      [CHANGED]: "changed",
      [FUSED]: key === "after" ? "fused" : `fused into ${clip(pattern?.name ?? "", 60)}`,
      [ALONE]: key === "after" ? "added" : "removed",
    };
    return words[status[node]] + (misses.has(node) ? ", near miss" : "");
  }

  swatch(key, node) {
    const status = this.diff[key].status[node];
    const alone = key === "after" ? "added" : "removed";
    if (status === FUSED) return this.patternSwatch(this.diff.pattern(key, node));
    return make(`span.swatch${status === CHANGED ? ".changed" : status === ALONE ? `.${alone}` : ""}`);
  }

  patternSwatch(pattern) {
    return this.paint(make("span.swatch", { pattern }));
  }

  paint(swatch) {
    swatch.style.background = this.colours.of(swatch.pattern, "pale");
    swatch.style.borderColor = this.colours.of(swatch.pattern, "deep");
    return swatch;
  }

  /** Shows one pattern alone in colour, and goes to its first fusion; -1 for all. */
  choosePattern(pattern) {
    this.chosen = pattern;
    for (const one of document.querySelectorAll("#legend button")) one.ariaPressed = `${one.pattern === pattern}`;
    this.redraw();
    if (pattern >= 0) this.stepFusion(0);
  }

  /** The next fusion (1), the one before (-1) or the first (0), of the chosen pattern if there is one. */
  stepFusion(step) {
    const wanted = ({ pattern, after }) => after.length && (this.chosen < 0 || pattern === this.chosen);
    const order = this.diff.regions
      .filter(wanted)
      .map(({ after }) => after[0])
      .sort((a, b) => a - b);
    const now = this.selected ? (this.diff.related(this.selected.side, this.selected.node, "after")[0] ?? -1) : -1;
    const next =
      step > 0 ? order.find((node) => node > now) : step < 0 ? order.findLast((node) => node < now) : order[0];
    const node = next ?? order.at(step > 0 ? 0 : -1);
    if (node !== undefined) this.select({ side: "after", node }, { everywhere: true });
  }

  // Search.

  search(text) {
    this.found = this.diff.search(text);
    this.at = -1;
    for (const key of SIDES) this.matches[key] = this.found.filter(([side]) => side === key).map(([, node]) => node);
    const { length } = this.found;
    find("#found").textContent = !text.trim()
      ? ""
      : !length
        ? "no match"
        : length > 1
          ? `${length} matches`
          : "1 match";
    this.redraw();
  }

  stepFound(step) {
    const { length } = this.found;
    if (!length) return;
    this.at = this.at < 0 && step < 0 ? length - 1 : (this.at + step + length) % length;
    const [side, node] = this.found[this.at];
    this.select({ side, node }, { everywhere: true });
    find("#found").textContent = `${this.at + 1} of ${length}`;
  }

  // Layers.

  rebuild(pane) {
    pane.scene.build();
    pane.map.drawScene();
    pane.invalidate();
    this.linking.forget();
  }

  /** Unfolds or folds one run of layers; in both graphs where that is asked for. */
  toggle(key, fold, both = false) {
    const open = !this.panes[key].scene.open[fold];
    const { label } = this.diff[key].folds[fold];
    for (const pane of both ? this.all : [this.panes[key]]) {
      const same = pane.key === key ? fold : pane.side.folds.findIndex((one) => one.label === label);
      if (same >= 0) this.setOpen(pane, same, open);
    }
  }

  unfold(open, panes = this.all) {
    for (const pane of panes) pane.side.folds.forEach((_, fold) => this.setOpen(pane, fold, open));
  }

  setOpen(pane, fold, open) {
    if (pane.scene.open[fold] === open || pane.side.folds[fold].layers.length < 2) return;
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
    const { side, figure, canvas, key } = pane;
    const open = this.isOpen(pane);
    const operators = count(side.nodes.length, "operator");
    const repeated = side.folds.reduce((sum, { layers }) => sum + (layers.length > 1 ? layers.length : 0), 0);
    const fold = figure.querySelector(".fold");
    fold.hidden = !repeated;
    fold.ariaExpanded = `${open}`;
    fold.textContent = `${open ? "Fold" : "Unfold"} ${repeated} layers`;
    figure.querySelector(".about").textContent = operators;
    const state = `${repeated} repeated layers, ${open ? "unfolded" : "folded"}`;
    canvas.ariaLabel = `${clip(side.name, 80)}, ${key}: ${operators}; ${state}. The outline lists all.`;
    find("#unfold").ariaPressed = `${this.all.every((one) => this.isOpen(one))}`;
  }

  // Views.

  setMode(mode) {
    this.mode = document.body.dataset.mode = mode;
    for (const one of document.querySelectorAll("button[data-mode]")) one.ariaPressed = `${one.dataset.mode === mode}`;
    for (const pane of this.shown) this.resized(pane); // now, not when the observer tells
  }

  fit() {
    for (const pane of this.shown) pane.fit();
  }

  follow(pane) {
    if (this.linking.on && this.mode === "both") this.linking.follow(pane);
  }

  /** One graph in the place of the other; what is selected stays at its place. */
  flip() {
    if (this.mode !== "before" && this.mode !== "after") return this.setMode("before");
    const from = this.panes[this.mode];
    const to = this.panes[opposite(this.mode)];
    this.setMode(to.key);
    this.linking.replace(from, to, this.lit);
  }

  zoom(factor) {
    const panes = this.linking.on ? this.shown.slice(0, 1) : this.shown;
    for (const pane of panes) pane.zoom(factor);
  }

  setTheme(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    find("#theme").textContent = dark ? "Light" : "Dark";
    this.colours = new Colours();
    for (const swatch of document.querySelectorAll(".swatch")) if (swatch.pattern >= 0) this.paint(swatch);
    for (const pane of this.all) this.resized(pane);
  }

  get dark() {
    return document.documentElement.dataset.theme === "dark";
  }

  // Paper: light, folded, whole.

  startPrint() {
    if (this.printing) return;
    this.printing = {
      dark: this.dark,
      opened: this.all.map((pane) => [...pane.scene.open]),
      views: this.all.map((pane) => pane.view),
    };
    this.setTheme(false);
    this.unfold(false);
    for (const pane of this.all) {
      pane.stage.style.width = `${PRINTED.width}px`;
      pane.stage.style.height = `${PRINTED.height}px`;
      pane.resize(PRINTED);
      pane.fit();
      pane.draw(); // before the paper is, which waits for no frame
    }
  }

  endPrint() {
    if (!this.printing) return;
    const { dark, opened, views } = this.printing;
    this.printing = null;
    this.all.forEach((pane, number) => {
      pane.stage.style.width = pane.stage.style.height = "";
      opened[number].forEach((open, fold) => this.setOpen(pane, fold, open));
      pane.view = views[number];
    });
    this.setTheme(dark);
  }

  // Keys and buttons.

  listen() {
    const on = (selector, act) => find(selector).addEventListener("click", act);
    const query = find("#query");
    for (const one of document.querySelectorAll("button[data-mode]"))
      one.addEventListener("click", () => this.setMode(one.dataset.mode));
    for (const pane of this.all) {
      pane.figure.querySelector(".fold").addEventListener("click", () => this.unfold(!this.isOpen(pane), [pane]));
    }
    on("#unfold", () => this.unfold(find("#unfold").ariaPressed !== "true"));
    on("#fit", () => this.fit());
    on("#theme", () => this.setTheme(!this.dark));
    on("#keys", () => find("#help").showModal());
    on("#fusion-next", () => this.stepFusion(1));
    on("#fusion-previous", () => this.stepFusion(-1));
    on("#next", () => this.stepFound(1));
    on("#previous", () => this.stepFound(-1));
    on("#link", () => {
      this.linking.on = !this.linking.on;
      find("#link").ariaPressed = `${this.linking.on}`;
    });
    query.addEventListener("input", () => this.search(query.value));
    query.addEventListener("keydown", (event) => event.key === "Enter" && this.stepFound(event.shiftKey ? -1 : 1));
    document.addEventListener("keydown", (event) => this.key(event));
    this.darkness.addEventListener("change", () => this.setTheme(this.darkness.matches));
    addEventListener("beforeprint", () => this.startPrint());
    addEventListener("afterprint", () => this.endPrint());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || find("#help").open) return;
    if (event.key === "Escape") return this.clear();
    if (event.target.matches("input")) return;
    const pane = this.all.find(({ canvas }) => canvas === event.target);
    const act = this.keys[event.key] ?? (pane && this.paneKeys(pane)[event.key]);
    if (!act) return;
    event.preventDefault();
    act();
  }

  get keys() {
    return {
      "/": () => find("#query").select(),
      "?": () => find("#help").showModal(),
      ".": () => this.stepFusion(1),
      ",": () => this.stepFusion(-1),
      1: () => this.setMode("both"),
      2: () => this.setMode("before"),
      3: () => this.setMode("after"),
      4: () => this.setMode("list"),
      x: () => this.flip(),
      e: () => find("#unfold").click(),
      d: () => this.setTheme(!this.dark),
      0: () => this.fit(),
      "+": () => this.zoom(ZOOM),
      "=": () => this.zoom(ZOOM),
      "-": () => this.zoom(1 / ZOOM),
    };
  }

  paneKeys(pane) {
    return {
      ArrowLeft: () => pane.pan(-PAN, 0),
      ArrowRight: () => pane.pan(PAN, 0),
      ArrowUp: () => pane.pan(0, -PAN),
      ArrowDown: () => pane.pan(0, PAN),
      PageUp: () => pane.pan(0, -0.8 * pane.height),
      PageDown: () => pane.pan(0, 0.8 * pane.height),
      Enter: () => this.unfold(!this.isOpen(pane), [pane]),
    };
  }

  clear() {
    find("#query").value = "";
    this.search("");
    this.choosePattern(-1);
    this.select(null);
  }
}

// What tests ask: how many graphs were drawn, when the first was (ms since the page was asked for), and the page itself.
window.fuserDiff = { frames: 0 };
window.fuserDiff.page = new Page(new Diff(JSON.parse(find("#document").textContent)));
