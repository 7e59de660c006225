// The document that fuser/diff/document.py defines, with what the page asks of it. Nodes are numbers of their side.

const [NAME, OP, MODULE, LAYER, , INPUTS, OUTPUTS] = [0, 1, 2, 3, 4, 5, 6]; // of a node
const [SAME, CHANGED, FUSED, ALONE] = [0, 1, 2, 3]; // ALONE: removed where it is before, added where it is after
const CHIP = 3; // the kind of values that are labels at their readers
const SIDES = ["before", "after"];

const opposite = (key) => (key === "before" ? "after" : "before");
const clip = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function addTo(map, key, item) {
  const items = map.get(key);
  if (items) items.push(item);
  else map.set(key, [item]);
}

class Side {
  constructor(key, data) {
    Object.assign(this, data); // name, nodes, values, outputs, layers, folds, members, scopes
    this.key = key;
    this.status = new Uint8Array(data.nodes.length).fill(ALONE);
    this.partner = new Int32Array(data.nodes.length).fill(-1);
    this.regions = new Map(); // the regions a node is in
    this.misses = new Map();
    this.position = new Int32Array(data.nodes.length).fill(-1); // among the members of its layer
    for (const members of data.members) members.forEach((node, position) => (this.position[node] = position));
    this.producer = new Int32Array(data.values.length).fill(-1);
    this.readers = new Map();
    data.nodes.forEach((node, index) => {
      for (const value of node[OUTPUTS]) if (value >= 0) this.producer[value] = index;
      for (const value of new Set(node[INPUTS])) if (value >= 0) addTo(this.readers, value, index);
    });
  }

  label(node) {
    const op = this.nodes[node][OP];
    return clip(op.slice(op.lastIndexOf(".") + 1), 40);
  }

  chips(node) {
    return this.nodes[node][INPUTS].filter((value) => value >= 0 && this.values[value][2] === CHIP);
  }
}

class Diff {
  constructor(data) {
    Object.assign(this, data); // title, summary, modules, patterns, regions, pairs, changed, misses
    this.before = new Side("before", data.sides.before);
    this.after = new Side("after", data.sides.after);
    this.differences = new Map(); // of changed nodes after
    for (const [before, after] of data.pairs) this.join(before, after, SAME);
    for (const [before, after, what] of data.changed) {
      this.join(before, after, CHANGED);
      if (what) this.differences.set(after, what);
    }
    data.regions.forEach((region, index) => SIDES.forEach((key) => this.mark(this[key], region[key], index)));
    for (const miss of data.misses) {
      for (const node of [miss.before, ...miss.also]) addTo(this.before.misses, node, miss);
    }
  }

  join(before, after, status) {
    this.before.partner[before] = after;
    this.after.partner[after] = before;
    this.before.status[before] = this.after.status[after] = status;
  }

  mark(side, nodes, region) {
    for (const node of nodes) {
      addTo(side.regions, node, region);
      side.status[node] = FUSED;
    }
  }

  /** The nodes of a side that go with a node: those of its regions, or its like. */
  related(key, node, wanted) {
    const side = this[key];
    const regions = side.regions.get(node);
    if (regions) return [...new Set(regions.flatMap((region) => this.regions[region][wanted]))];
    if (wanted === key) return [node];
    return side.partner[node] >= 0 ? [side.partner[node]] : [];
  }

  pattern(key, node) {
    const regions = this[key].regions.get(node);
    return regions ? this.regions[regions[0]].pattern : -1;
  }

  module(key, node) {
    return this.modules[this[key].nodes[node][MODULE]] ?? "";
  }

  textsOf(key) {
    const text = (node, index) => `${node[OP]}\n${node[NAME]}\n${this.module(key, index)}`;
    return this[key].nodes.map((node, index) => text(node, index).toLowerCase());
  }

  /** Nodes whose operator, name or module holds a text; one entry for a node that is on both sides. */
  search(text) {
    this.texts ??= { before: this.textsOf("before"), after: this.textsOf("after") };
    const wanted = text.trim().toLowerCase();
    const found = [];
    if (!wanted) return found;
    for (const key of SIDES) {
      this.texts[key].forEach((own, node) => {
        const twin = key === "after" ? this.after.partner[node] : -1;
        if (own.includes(wanted) && !(twin >= 0 && this.texts.before[twin].includes(wanted))) found.push([key, node]);
      });
    }
    return found;
  }
}
