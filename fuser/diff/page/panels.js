// What stands around the graphs. Text of a model enters as text alone, and not without end.

const LONGEST = 600; // characters of one text

/** An element of a kind (`tag.class.class`) with text, elements and, from objects, properties. */
function make(kind, ...content) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  element.className = classes.join(" ");
  for (const part of content) {
    if (typeof part === "object" && !(part instanceof Node)) Object.assign(element, part);
    else element.append(typeof part === "string" ? clip(part, LONGEST) : part);
  }
  return element;
}

const plain = (text) => make("span.text", text ?? "");
const code = (text) => make("code", text ?? "");

function button(kind, act, ...content) {
  const made = make(kind, { type: "button" }, ...content);
  made.addEventListener("click", act);
  return made;
}

function showSummary({ diff }) {
  document.title = clip(diff.title, 120);
  for (const key of SIDES) document.querySelector(`#name-${key}`).textContent = clip(diff[key].name, 200);
  for (const { label, before, after, note } of diff.summary) {
    const changed = before && after && before !== after;
    const value = changed ? [plain(before), make("span.quiet", " → "), plain(after)] : [plain(after || before)];
    const card = make("div", make("dt", label), make("dd", ...value, make("small", note ?? "")));
    document.querySelector("#cards").append(card);
  }
}

const MARKS = [
  ["swatch", "unchanged"],
  ["swatch.removed", "removed"],
  ["swatch.added", "added"],
  ["swatch.changed", "changed"],
  ["swatch.miss", "near miss"],
  ["swatch.chip", "read by many"],
];

function showLegend(page) {
  const { diff } = page;
  const legend = document.querySelector("#legend");
  const numbers = new Map();
  for (const region of diff.regions) addTo(numbers, region.pattern, region);
  diff.patterns.forEach(({ name, about }, pattern) => {
    if (!numbers.has(pattern)) return;
    const choose = () => page.choosePattern(page.chosen === pattern ? -1 : pattern);
    const number = make("span.quiet", `${numbers.get(pattern).length}`);
    const made = button("button", choose, page.patternSwatch(pattern), make("span", name), number);
    legend.append(Object.assign(made, { pattern, title: clip(about ?? "", LONGEST), ariaPressed: "false" }));
  });
  for (const [kind, label] of MARKS) legend.append(make("span.key", make(`span.${kind}`), make("span.quiet", label)));
}

// The list: every fusion once, however often it is made, and what was nearly one. It is printed beside the graphs.

const FUSIONS = ["Fusion", "Times", "First at", "Replaces", "Check", "Saved by each", "Pattern"];
const MISSES = ["Nearly", "Times", "First at", "Expected", "Found", "Pattern"];

function showList(page) {
  const { diff } = page;
  const alike = new Map();
  const list = document.querySelector("#list");
  for (const region of diff.regions) addTo(alike, `${region.pattern} ${tally(diff.before, region.before)}`, region);
  const groups = [...alike.values()].sort((a, b) => a[0].pattern - b[0].pattern || b.length - a.length);
  const fusions = groups.map((regions) => fusionRow(page, regions));
  const misses = diff.misses.map((miss) => missRow(page, miss));
  list.append(table("Fusions", FUSIONS, fusions));
  if (misses.length) list.append(table("Near misses", MISSES, misses));
  const others = [othersOf(diff.before, ALONE, "Removed"), othersOf(diff.after, ALONE, "Added")];
  list.append(...others.flat(), ...othersOf(diff.before, CHANGED, "Changed"));
}

/** A line about what is in no fusion, if there is any. */
function othersOf(side, status, title) {
  const nodes = [...side.status.keys()].filter((node) => side.status[node] === status);
  if (!nodes.length) return [];
  return [make("p", make("strong", `${title}: ${count(nodes.length, "operator")}. `), tally(side, nodes))];
}

function table(title, head, rows) {
  const cells = (row) => row.map((cell) => make("td", ...[cell].flat()));
  const names = head.map((name) => make("th", { scope: "col" }, name));
  const body = rows.map((row) => make("tr", ...cells(row)));
  return make("table", make("caption", title), make("thead", make("tr", ...names)), make("tbody", ...body));
}

function fusionRow(page, regions) {
  const { diff } = page;
  const [{ pattern, after, before, note, saved }] = regions;
  const { name, line } = diff.patterns[pattern];
  const at = after.length ? ["after", after[0]] : ["before", before[0]];
  const replaced = `${count(before.length, "operator")}: ${tally(diff.before, before)}`;
  const link = [page.patternSwatch(pattern), jump(page, name, at)];
  return [link, `${regions.length}`, plain(diff.module(...at)), plain(replaced), plain(note), plain(saved), code(line)];
}

function missRow(page, { pattern, before, expected, found, line, also }) {
  const { diff } = page;
  const link = [make("span.swatch.miss"), jump(page, diff.patterns[pattern].name, ["before", before])];
  const times = `${1 + also.length}`;
  const place = plain(diff.module("before", before));
  return [link, times, place, code(expected), code(found), code(line)];
}

function jump(page, name, [side, node]) {
  const go = () => {
    page.setMode("both");
    page.select({ side, node }, { everywhere: true });
  };
  return button("button", go, clip(name, 80));
}

/** Operators with how often each is there: `Mul ×3, Add`. */
function tally(side, nodes) {
  const numbers = new Map();
  for (const node of nodes) addTo(numbers, side.label(node), node);
  const most = [...numbers].sort((a, b) => b[1].length - a[1].length);
  return most.map(([op, { length }]) => (length > 1 ? `${op} ×${length}` : op)).join(", ");
}
