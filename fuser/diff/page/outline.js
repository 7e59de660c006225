// The outline: modules, in them operators, and in a fused one what it stands for. It is the accessible form of the graphs.

const REMOVED = "removed operators"; // of a module: together, for an exporter may write many

class Branch {
  constructor(label) {
    this.label = label; // of a layer, which stands in its stack: the end of its path
    this.branches = new Map(); // modules within, by name, in the order of the graph
    this.leaves = []; // [side, node]
    this.counts = { before: 0, after: 0 };
  }

  branch(label) {
    if (!this.branches.has(label)) this.branches.set(label, new Branch(label.split(".").slice(-2).join(".")));
    return this.branches.get(label);
  }
}

/** All modules of both sides as one tree; what has a source stands where its source does. */
function outlineOf(diff) {
  const root = new Branch("");
  const add = (key, node) => {
    let branch = root;
    for (const label of pathOf(diff, ...home(diff, key, node))) {
      branch = branch.branch(label);
      branch.counts[key]++;
    }
    return branch;
  };
  const placed = new Set();
  const place = (after) => {
    const branch = add("after", after);
    if (diff.after.partner[after] < 0) branch.leaves.push(["after", after]);
    placed.add(after);
  };
  diff.before.nodes.forEach((_, node) => {
    const branch = add("before", node);
    const became = diff.related("before", node, "after");
    if (!diff.before.regions.has(node)) branch.leaves.push(["before", node]);
    for (const after of became) if (!placed.has(after)) place(after);
  });
  diff.after.nodes.forEach((_, node) => placed.has(node) || place(node));
  return root;
}

/** Where a node is in the outline: that of the result is where most of its sources are. */
function home(diff, key, node) {
  const sources = key === "after" ? diff.related(key, node, "before") : [];
  const numbers = new Map();
  if (!sources.length) return [key, node];
  for (const source of sources) addTo(numbers, diff.before.nodes[source][MODULE], source);
  return ["before", [...numbers.values()].reduce((most, one) => (one.length > most.length ? one : most))[0]];
}

/** The names from the top to a node. */
function pathOf(diff, key, node) {
  const { status, misses } = diff[key];
  const removed = key === "before" && status[node] === ALONE && !misses.has(node);
  return [...modulesOf(diff[key], node, diff.module(key, node)), ...(removed ? [REMOVED] : [])];
}

/** The stack of a node's layer, the run, the layer, the modules within. */
function modulesOf(side, node, module) {
  const isIn = ({ label }) => `${module}.`.startsWith(`${label}.`); // what layers share stands in the first's module
  const layer = side.layers[side.nodes[node][LAYER]] ?? side.layers.find(isIn);
  if (!layer) return module ? module.split(".") : [];
  const { label, layers } = side.folds[layer.fold];
  const stack = layer.label.split(".").slice(0, -1);
  const run = layers.length > 1 ? [`${label} × ${layers.length}`] : [];
  const inside = module.startsWith(`${layer.label}.`) ? module.slice(layer.label.length + 1).split(".") : [];
  return [...stack, ...run, layer.label, ...inside];
}

class Outline {
  constructor(page, tree) {
    this.page = page;
    this.tree = tree;
    this.root = outlineOf(page.diff);
    this.fill(tree, this.root, 1);
    tree.querySelector('[role="treeitem"]')?.setAttribute("tabindex", "0");
    tree.addEventListener("click", (event) => this.click(event));
    tree.addEventListener("keydown", (event) => this.key(event));
    tree.addEventListener("pointerover", (event) => page.hover(event.target.closest("[role=treeitem]")?.entry ?? null));
    tree.addEventListener("pointerleave", () => page.hover(null));
  }

  fill(list, branch, level) {
    const removed = branch.branches.get(REMOVED);
    for (const inner of branch.branches.values()) if (inner !== removed) list.append(this.module(inner, level));
    for (const [key, node] of branch.leaves) list.append(this.operator(key, node, level));
    if (removed) list.append(this.module(removed, level, make("span.swatch.removed")));
  }

  module(branch, level, ...marks) {
    const names = [branch.label];
    while (branch.branches.size === 1 && !branch.leaves.length && !branch.branches.has(REMOVED)) {
      // a path without forks is one item
      [branch] = branch.branches.values();
      if (branch.label.startsWith(`${names.at(-1)}.`)) names.pop(); // layers.0-31 says layers
      names.push(branch.label);
    }
    const { before, after } = branch.counts;
    const counts = before === after || branch.label === REMOVED ? `${before}` : `${before} → ${after}`;
    const fill = (branch.branches.size || branch.leaves.length) && ((list) => this.fill(list, branch, level + 1));
    const item = this.item(level, names.join("."), counts, fill, ...marks);
    item.branch = branch;
    return item;
  }

  operator(key, node, level) {
    const { diff } = this.page;
    const sources = key === "after" ? diff.related(key, node, "before") : [];
    const fused = diff[key].status[node] === FUSED && sources.length;
    const fill = (list) => list.append(...sources.map((source) => this.operator("before", source, level + 1)));
    const from = fused ? `from ${sources.length}` : "";
    const swatch = this.page.swatch(key, node);
    const item = this.item(level, diff[key].label(node), from, fused && fill, swatch);
    item.entry = { side: key, node };
    item.setAttribute("aria-label", `${diff[key].label(node)}, ${this.page.state(key, node)}`);
    return item;
  }

  item(level, label, count, fill, ...marks) {
    const twist = make("span.twist", { ariaHidden: "true" }, fill ? "▸" : "");
    const row = make("div.row", twist, ...marks, make("span.text", label), make("span.count", count));
    const item = make("li", { role: "treeitem", tabIndex: -1, ariaLevel: `${level}` }, row);
    if (fill) item.ariaExpanded = "false";
    item.fill = fill;
    return item;
  }

  open(item, wanted = true) {
    if (!item.fill || (item.ariaExpanded === "true") === wanted) return;
    item.ariaExpanded = `${wanted}`;
    item.querySelector(".twist").textContent = wanted ? "▾" : "▸";
    if (wanted) item.fill(item.appendChild(make("ul", { role: "group" })));
    else item.lastChild.remove();
  }

  click(event) {
    const item = event.target.closest("[role=treeitem]");
    if (!item) return;
    if (!item.entry || event.target.className === "twist") this.open(item, item.ariaExpanded !== "true");
    this.focus(item);
    this.choose(item);
  }

  choose(item) {
    if (item.entry) this.page.select(item.entry, { everywhere: true });
    else if (item.branch) this.page.revealAll(firstLeaves(item.branch));
  }

  focus(item) {
    this.tree.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    item.tabIndex = 0;
    item.focus({ preventScroll: true });
    item.firstChild.scrollIntoView({ block: "nearest" });
  }

  /** The entry that stands for a node: what it was fused into, or its source where it was not. */
  place({ side: key, node }) {
    const fused = this.page.diff[key].status[node] === FUSED;
    const wanted = fused ? "after" : "before";
    const [found] = key === wanted ? [node] : this.page.diff.related(key, node, wanted);
    return found === undefined ? [key, node] : [wanted, found];
  }

  /** Marks the item of what is selected, opening the modules it is in. */
  show(selected) {
    this.tree.querySelector('[aria-selected="true"]')?.removeAttribute("aria-selected");
    if (!selected) return;
    const { diff } = this.page;
    const [key, node] = this.place(selected);
    const labels = pathOf(diff, ...home(diff, key, node));
    let list = this.tree;
    for (let branch = this.root, depth = 0; depth < labels.length; depth++) {
      branch = branch.branches.get(labels[depth]);
      const item = [...list.children].find((one) => one.branch === branch);
      if (!item) continue; // a part of a path without forks
      this.open(item);
      list = item.lastChild;
    }
    const item = [...list.children].find((one) => one.entry?.side === key && one.entry.node === node);
    item?.setAttribute("aria-selected", "true");
    item?.firstChild.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const item = event.target.closest("[role=treeitem]");
    const visible = [...this.tree.querySelectorAll("[role=treeitem]")];
    const at = visible.indexOf(item);
    const opened = item.ariaExpanded === "true";
    const moves = {
      ArrowDown: () => visible[at + 1],
      ArrowUp: () => visible[at - 1],
      Home: () => visible[0],
      End: () => visible.at(-1),
      ArrowRight: () => (opened ? visible[at + 1] : this.open(item)),
      ArrowLeft: () => (opened ? this.open(item, false) : item.parentElement.closest("[role=treeitem]")),
      Enter: () => this.choose(item),
      " ": () => this.choose(item),
    };
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const next = move();
    if (next) this.focus(next);
  }
}

function firstLeaves(branch) {
  if (branch.leaves.length) return branch.leaves;
  const [inner] = branch.branches.values();
  return inner ? firstLeaves(inner) : [];
}
