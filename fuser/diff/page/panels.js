// What stands around the graphs. Text of a model enters through textContent alone.

const LISTED = 24; // items of a list in the details
const LONGEST = 600; // characters of one text there

/** An element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const plain = (text) => make("span", { className: "text", textContent: clip(text, LONGEST) });
const code = (text) => make("code", { textContent: clip(text, LONGEST) });

function showSummary({ diff }) {
  document.title = clip(diff.title, 120);
  for (const key of SIDES) document.querySelector(`#name-${key}`).textContent = clip(diff[key].name, 200);
  document.querySelector("#cards").append(...diff.summary.map(({ label, before, after, note }) => {
    const both = before && after && before !== after;
    const value = both ? [plain(before), make("span", { className: "quiet", textContent: " → " }), plain(after)] : [plain(after || before)];
    return make("div", {}, make("dt", { textContent: clip(label, 60) }), make("dd", {}, ...value, make("small", { textContent: clip(note ?? "", 120) })));
  }));
}

function showLegend(page) {
  const { diff } = page, legend = document.querySelector("#legend"), numbers = diff.patterns.map(() => 0);
  for (const { pattern } of diff.regions) numbers[pattern]++;
  diff.patterns.forEach(({ name, about }, pattern) => {
    if (!numbers[pattern]) return;
    const mark = page.patternSwatch(pattern), label = make("span", { textContent: clip(name, 60) });
    const button = make("button", { type: "button", title: clip(about ?? "", 200), ariaPressed: "false" }, mark, label, make("span", { className: "quiet", textContent: `${numbers[pattern]}` }));
    button.addEventListener("click", () => page.choosePattern(page.chosen === pattern ? -1 : pattern));
    button.pattern = pattern;
    legend.append(button);
  });
  const marks = [["", "unchanged"], ["removed", "removed"], ["added", "added"], ["changed", "changed"], ["miss", "near miss"], ["chip", "read by many"]];
  for (const [kind, label] of marks)
    legend.append(make("span", { className: "key" }, make("span", { className: `swatch ${kind}` }), make("span", { className: "quiet", textContent: label })));
}

class Details {
  constructor(page, element) {
    this.page = page;
    this.element = element;
  }

  show(selected) {
    if (!selected) return this.showHint();
    const { diff } = this.page, { side: key, node } = selected, side = diff[key];
    const [name, op, , layer, attributes, inputs, outputs] = side.nodes[node];
    const module = diff.module(key, node), label = layer < 0 ? "" : side.layers[layer].label;
    this.element.replaceChildren(
      make("h2", {}, plain(op)),
      make("p", { className: "tag" }, this.page.swatch(key, node), `${this.page.state(key, node)}, ${key}`),
      ...this.part("Name", code(name)),
      ...(module ? this.part("Module", code(module)) : []),
      ...(label && !module.startsWith(label) ? this.part("Layer", plain(label)) : []),
      ...(attributes ? this.part("Attributes", code(attributes)) : []),
      ...(diff.differences.has(node) && key === "after" ? this.part("What differs", plain(diff.differences.get(node))) : []),
      ...this.misses(key, node),
      ...(side.regions.get(node) ?? []).flatMap((region) => this.region(region, selected)),
      ...this.counterpart(key, node),
      ...this.values("Inputs", side, inputs, (value) => (side.producer[value] >= 0 ? [side.producer[value]] : [])),
      ...this.values("Outputs", side, outputs, (value) => side.readers.get(value) ?? []),
    );
    this.element.scrollTop = 0;
  }

  showHint() {
    this.element.replaceChildren(
      make("h2", { textContent: "Details" }),
      make("p", { className: "quiet", textContent: "Select an operator, in a graph or in the outline. What it became, or what it stands for, is marked in the other graph." }),
    );
  }

  part(title, ...content) {
    return content.length ? [make("h3", { textContent: title }), ...content] : [];
  }

  region(index, selected) {
    const { diff } = this.page, { pattern, note, saved, before, after } = diff.regions[index], { name, about, line } = diff.patterns[pattern];
    const links = (key, nodes) => this.list(nodes.filter((node) => key !== selected.side || node !== selected.node), (node) => [this.link(key, node)]);
    return [
      ...this.part("Fusion", make("p", { className: "tag" }, this.page.patternSwatch(pattern), make("strong", { textContent: clip(name, 80) }))),
      ...(about ? [make("p", { className: "quiet", textContent: clip(about, LONGEST) })] : []),
      ...(line ? this.part("Pattern", code(line)) : []),
      ...(note ? this.part("Check", plain(note)) : []),
      ...(saved ? this.part("Saved", plain(saved)) : []),
      ...this.part(selected.side === "before" ? "Became" : "Together with", ...links("after", after)),
      ...this.part(selected.side === "after" ? `Stands for ${count(before.length, "operator")}` : "Together with", ...links("before", before)),
    ];
  }

  counterpart(key, node) {
    const partner = this.page.diff[key].partner[node];
    return partner < 0 ? [] : this.part(key === "before" ? "After" : "Before", ...this.list([partner], (one) => [this.link(opposite(key), one)]));
  }

  misses(key, node) {
    const found = (key === "before" && this.page.diff.before.misses.get(node)) || [];
    return found.map(({ pattern, expected, found, line }) => make("div", { className: "warning" },
      make("strong", { textContent: `Nearly ${clip(this.page.diff.patterns[pattern]?.name ?? "", 80)}` }),
      ...this.part("Expected", code(expected)), ...this.part("Found", code(found)), ...(line ? this.part("Pattern", code(line)) : [])));
  }

  values(title, side, values, ends) {
    const present = values.filter((value) => value >= 0), kinds = ["", " · graph input", " · constant", " · read by many"];
    return this.part(title, ...this.list(present, (value) => {
      const [name, type, kind] = side.values[value], given = side.outputs.includes(value) ? " · graph output" : "";
      const about = make("div", { className: "quiet" }, plain(`${type}${kinds[kind] ?? ""}${given}`));
      return [code(name), about, ...this.list(ends(value), (node) => [this.link(side.key, node)])];
    }));
  }

  list(items, show) {
    if (!items.length) return [];
    const rows = items.slice(0, LISTED).map((item) => make("li", {}, ...show(item)));
    if (items.length > LISTED) rows.push(make("li", { className: "quiet", textContent: `and ${items.length - LISTED} more` }));
    return [make("ul", { className: "links" }, ...rows)];
  }

  link(key, node) {
    const side = this.page.diff[key], button = make("button", { type: "button" },
      make("strong", { textContent: side.label(node) }), make("span", { className: "name", textContent: clip(side.nodes[node][NAME], 80) }));
    button.addEventListener("click", () => this.page.select({ side: key, node }, { from: this }));
    button.addEventListener("pointerenter", () => this.page.hover({ side: key, node }));
    button.addEventListener("pointerleave", () => this.page.hover(null));
    return button;
  }
}

// The list: every fusion once, however often it is made; and what was nearly one. It is what is printed beside the graphs.

function showList(page) {
  const { diff } = page, list = document.querySelector("#list"), tables = [fusionTable(page)];
  if (diff.misses.length) tables.push(missTable(page));
  const rest = [["before", ALONE, "Removed"], ["after", ALONE, "Added"], ["before", CHANGED, "Changed"]].map((row) => operatorsOf(diff, ...row)).filter(Boolean);
  list.append(...tables, ...rest);
}

function table(title, head, rows) {
  const cells = (row) => row.map((cell) => make("td", {}, ...[cell].flat()));
  return make("table", {}, make("caption", { textContent: title }),
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", textContent: text })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row)))));
}

function fusionTable(page) {
  const { diff } = page, alike = new Map();
  for (const region of diff.regions) addTo(alike, `${region.pattern} ${tally(diff.before, region.before)}`, region);
  const groups = [...alike.values()].sort((a, b) => a[0].pattern - b[0].pattern || b.length - a.length);
  return table("Fusions", ["Fusion", "Times", "First at", "Replaces", "Check", "Saved by each", "Pattern"], groups.map((regions) => {
    const [{ pattern, after, before, note, saved }] = regions, at = after.length ? ["after", after[0]] : ["before", before[0]];
    return [
      [page.patternSwatch(pattern), jump(page, diff.patterns[pattern].name, at)], `${regions.length}`, plain(diff.module(...at)),
      plain(`${count(before.length, "operator")}: ${tally(diff.before, before)}`), plain(note ?? ""), plain(saved ?? ""), code(diff.patterns[pattern].line ?? ""),
    ];
  }));
}

function missTable(page) {
  const { diff } = page;
  return table("Near misses", ["Nearly", "Times", "First at", "Expected", "Found", "Pattern"], diff.misses.map((miss) => [
    [make("span", { className: "swatch miss" }), jump(page, diff.patterns[miss.pattern]?.name ?? "", ["before", miss.before])],
    `${1 + (miss.also?.length ?? 0)}`, plain(diff.module("before", miss.before)), code(miss.expected), code(miss.found), code(miss.line ?? ""),
  ]));
}

function jump(page, name, [side, node]) {
  const button = make("button", { type: "button", textContent: clip(name, 80) });
  button.addEventListener("click", () => {
    page.setMode("both");
    page.select({ side, node }, { from: button });
  });
  return button;
}

/** Operators with how often each is there: `Mul ×3, Add`. */
function tally(side, nodes) {
  const numbers = new Map();
  for (const node of nodes) numbers.set(side.label(node), (numbers.get(side.label(node)) ?? 0) + 1);
  return [...numbers].sort((a, b) => b[1] - a[1]).map(([op, number]) => (number > 1 ? `${op} ×${number}` : op)).join(", ");
}

function operatorsOf(diff, key, status, title) {
  const side = diff[key], nodes = [...side.status.keys()].filter((node) => side.status[node] === status);
  return nodes.length && make("p", {}, make("strong", { textContent: `${title}: ${count(nodes.length, "operator")}. ` }), plain(tally(side, nodes)));
}
