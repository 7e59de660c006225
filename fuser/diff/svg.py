"""A diff as a drawing: before and after side by side, repeated layers once, what was fused in colours. No script, no links."""

from collections.abc import Iterator
from xml.sax.saxutils import escape

from fuser.diff.document import BOX_HEIGHT, FOLD_HEADER, FOLD_PADDING, Document, Edge, Side, box_width

GAP = 48.0  # px between the sides
TOP = 24.0  # px of a line of text
GOLDEN = 137.5  # degrees from the hue of one pattern to that of the next: no two are near
STYLE = """
text{font:11px system-ui,sans-serif;fill:#222}
.title{font-weight:600;font-size:14px}
.node{fill:#eef0f2;stroke:#b8bec5}
.gone{fill:#fdeceb;stroke:#cf6a63}
.new{fill:#e9f6ec;stroke:#5c9c6c}
.fold{fill:none;stroke:#8a929b;stroke-dasharray:5 3}
.edge{fill:none;stroke:#9aa1a9}
.name{text-anchor:middle}
@media (prefers-color-scheme:dark){svg{background:#16191d}text{fill:#e4e7ea}.node{fill:#262b31;stroke:#59616b}
.gone{fill:#43201f}.new{fill:#1c3824}.edge{stroke:#626a74}}
"""


def svg(document: Document) -> str:
    """The drawing, as one XML document."""
    heads = [
        f"{row.label}: {row.before} → {row.after}" if row.before else f"{row.label}: {row.after}"
        for row in document.summary
    ]
    names = [pattern.name for pattern in document.patterns]
    shown = sorted({region.pattern for region in document.regions})
    top = TOP * (4 + len(heads))
    sides = [document.before, document.after]
    lefts = [GAP / 2, GAP / 2 + sides[0].scopes[0].width + GAP]
    width = max(640.0, lefts[1] + sides[1].scopes[0].width + GAP / 2)
    height = top + max(side.scopes[0].height for side in sides) + TOP * (2 + len(shown))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" aria-label="{_text(document.title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{GAP / 2:g}" y="{TOP:g}">{_text(document.title)}</text>',
    ]
    lines += (f'<text x="{GAP / 2:g}" y="{TOP * (2 + n):g}">{_text(head)}</text>' for n, head in enumerate(heads))
    for which, (side, left) in enumerate(zip(sides, lefts, strict=True)):
        title = ("before", "after")[which]
        lines.append(f'<text class="title" x="{left:g}" y="{top - TOP / 2:g}">{title}</text>')
        lines += [f'<g transform="translate({left:g} {top:g})">', *_Drawn(document, which).lines(side), "</g>"]
    bottom = height - TOP * (len(shown) + 0.5)
    for place, number in enumerate(shown):
        y = bottom + TOP * place
        lines.append(f'<rect x="{GAP / 2:g}" y="{y:g}" width="28" height="14" rx="4" style="{_colour(number)}"/>')
        lines.append(f'<text x="{GAP / 2 + 36:g}" y="{y + 11:g}">{_text(names[number])}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _text(text: str) -> str:
    """Text that XML may hold, as text or between double quotes."""
    return escape(text, {'"': "&quot;"})


def _colour(pattern: int) -> str:
    hue = round(pattern * GOLDEN) % 360
    return f"fill:hsl({hue} 70% 60% / .35);stroke:hsl({hue} 60% 45%)"


class _Drawn:
    """One side's scopes as elements."""

    def __init__(self, document: Document, which: int) -> None:
        self.pattern_of: dict[int, int] = {}
        for region in reversed(document.regions):
            numbers = region.after if which else region.before
            self.pattern_of.update(dict.fromkeys(numbers, region.pattern))
        self.kept = {change.after if which else change.before for change in document.kept()}
        self.alone = "new" if which else "gone"

    def lines(self, side: Side) -> Iterator[str]:
        top = side.scopes[0]
        centres = {item: (x, y) for item, x, y in top.places}
        yield from (self._edge(edge, {item: self._half(side, item) for item in centres}, centres) for edge in top.edges)
        for item, x, y in top.places:
            if item >= 0:
                yield from self._node(side, item, x, y)
                continue
            fold = side.folds[-1 - item]
            scope, members = side.scopes[fold.scope], side.members[fold.layers[0]]
            width, height = scope.width + 2 * FOLD_PADDING, scope.height + FOLD_HEADER + FOLD_PADDING
            times = f"  × {len(fold.layers)}" if len(fold.layers) > 1 else ""
            left, above = x - width / 2, y - height / 2
            yield f'<rect class="fold" x="{left:g}" y="{above:g}" width="{width:g}" height="{height:g}" rx="8"/>'
            label = _text(fold.label + times)
            yield f'<text x="{left + FOLD_PADDING:g}" y="{above + 16:g}">{label}</text>'
            yield f'<g transform="translate({left + FOLD_PADDING:g} {above + FOLD_HEADER:g})">'
            inner = {position: (px, py) for position, px, py in scope.places}
            halves = dict.fromkeys(inner, BOX_HEIGHT / 2)
            yield from (self._edge(edge, halves, inner) for edge in scope.edges)
            for position, (px, py) in inner.items():
                yield from self._node(side, members[position], px, py)
            yield "</g>"

    def _half(self, side: Side, item: int) -> float:
        """Half of the height of an item's box."""
        if item >= 0:
            return BOX_HEIGHT / 2
        return (side.scopes[side.folds[-1 - item].scope].height + FOLD_HEADER + FOLD_PADDING) / 2

    def _node(self, side: Side, number: int, x: float, y: float) -> Iterator[str]:
        item = side.nodes[number]
        width = box_width(item.label)
        place = f'x="{x - width / 2:g}" y="{y - BOX_HEIGHT / 2:g}" width="{width:g}" height="{BOX_HEIGHT:g}" rx="4"'
        pattern = self.pattern_of.get(number)
        kind = "node" if number in self.kept or pattern is not None else self.alone
        style = f' style="{_colour(pattern)}"' if pattern is not None else ""
        fits = int((width - 8) / 6.2)
        label = item.label if len(item.label) <= fits else item.label[: fits - 1] + "…"
        yield f'<rect class="{kind}" {place}{style}><title>{_text(f"{item.op}  {item.name}")}</title></rect>'
        yield f'<text class="name" x="{x:g}" y="{y + 4:g}">{_text(label)}</text>'

    def _edge(self, edge: Edge, halves: dict[int, float], centres: dict[int, tuple[float, float]]) -> str:
        points = [*zip(edge.bends[::2], edge.bends[1::2], strict=True)]
        if edge.start is not None:
            x, y = centres[edge.start]
            points.insert(0, (x, y + halves[edge.start]))
        if edge.end is not None:
            x, y = centres[edge.end]
            points.append((x, y - halves[edge.end]))
        return f'<polyline class="edge" points="{" ".join(f"{x:g},{y:g}" for x, y in points)}"/>'
