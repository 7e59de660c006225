// What is known of the selected node, with links to its neighbours and to what it became or stands for.

const LISTED = 24; // items of a list
const KINDS = ["", " · graph input", " · constant", " · read by many"]; // of values

class Details {
  constructor(page, element) {
    this.page = page;
    this.diff = page.diff;
    this.element = element;
  }

  show(selected) {
    if (!selected) return this.showHint();
    const { side: key, node } = selected;
    const side = this.diff[key];
    const module = this.diff.module(key, node);
    const [name, op, , layer, attributes, inputs, outputs] = side.nodes[node];
    const label = side.layers[layer]?.label ?? "";
    const state = `${this.page.state(key, node)}, ${key}`;
    this.element.replaceChildren(
      make("h2", op),
      make("p.tag", this.page.swatch(key, node), state),
      ...this.text("Name", name, code),
      ...this.text("Module", module, code),
      ...this.text("Layer", module.startsWith(label) ? "" : label),
      ...this.text("Attributes", attributes, code),
      ...this.text("What differs", key === "after" ? this.diff.differences.get(node) : ""),
      ...(side.misses.get(node) ?? []).map((miss) => this.miss(miss)),
      ...(side.regions.get(node) ?? []).flatMap((region) => this.region(region, selected)),
      ...this.counterpart(key, node),
      ...this.values("Inputs", side, inputs, (value) => [side.producer[value]].filter((one) => one >= 0)),
      ...this.values("Outputs", side, outputs, (value) => side.readers.get(value) ?? []),
    );
    this.element.scrollTop = 0;
  }

  showHint() {
    const hint = "Select an operator, in a graph or in the outline: what goes with it is marked in the other graph.";
    this.element.replaceChildren(make("h2", "Details"), make("p.quiet", hint));
  }

  part(title, ...content) {
    return content.length ? [make("h3", title), ...content] : [];
  }

  text(title, text, form = plain) {
    return text ? this.part(title, form(text)) : [];
  }

  region(index, { side, node }) {
    const { pattern, note, saved, before, after } = this.diff.regions[index];
    const { name, about, line } = this.diff.patterns[pattern];
    const others = (key, nodes) => nodes.filter((one) => key !== side || one !== node);
    const sources = side === "after" ? `Stands for ${count(before.length, "operator")}` : "Together with";
    return [
      ...this.part("Fusion", make("p.tag", this.page.patternSwatch(pattern), make("strong", name))),
      make("p.quiet", about ?? ""),
      ...this.text("Pattern", line, code),
      ...this.text("Check", note),
      ...this.text("Saved", saved),
      ...this.part(side === "before" ? "Became" : "Together with", ...this.links("after", others("after", after))),
      ...this.part(sources, ...this.links("before", others("before", before))),
    ];
  }

  counterpart(key, node) {
    const partner = this.diff[key].partner[node];
    const other = opposite(key);
    return partner < 0 ? [] : this.part(other === "after" ? "After" : "Before", ...this.links(other, [partner]));
  }

  miss({ pattern, expected, found, line }) {
    const reason = [...this.text("Expected", expected, code), ...this.text("Found", found, code)];
    const title = make("strong", `Nearly ${clip(this.diff.patterns[pattern].name, 80)}`);
    return make("div.warning", title, ...reason, ...this.text("Pattern", line, code));
  }

  values(title, side, values, ends) {
    const present = values.filter((value) => value >= 0);
    const show = (value) => {
      const [name, type, kind] = side.values[value];
      const given = side.outputs.includes(value) ? " · graph output" : "";
      const about = `${clip(type, LONGEST / 2)}${KINDS[kind] ?? ""}${given}`;
      return [code(name), make("div.quiet", plain(about)), ...this.links(side.key, ends(value))];
    };
    return this.part(title, ...this.list(present, show));
  }

  links(key, nodes) {
    return this.list(nodes, (node) => [this.link(key, node)]);
  }

  list(items, show) {
    if (!items.length) return [];
    const rows = items.slice(0, LISTED).map((item) => make("li", ...show(item)));
    if (items.length > LISTED) rows.push(make("li.quiet", `and ${items.length - LISTED} more`));
    return [make("ul.links", ...rows)];
  }

  link(key, node) {
    const { page } = this;
    const side = this.diff[key];
    const entry = { side: key, node };
    const text = [make("strong", side.label(node)), make("span.name", clip(side.nodes[node][NAME], 80))];
    const made = button("button", () => page.select(entry, { everywhere: true }), ...text);
    made.addEventListener("pointerenter", () => page.hover(entry));
    made.addEventListener("pointerleave", () => page.hover(null));
    return made;
  }
}
