"""The document of a diff: what every form of it (page, drawing, text) is made of. docs/diff.md says what its JSON holds.

Nodes are referred to by their index in `nodes` of their side, values by their index in `values` of their side.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

VERSION = 1
MOST = 256  # characters of a text that a model brings


BOX_HEIGHT = 20.0  # px, of a node
FOLD_PADDING = 12.0  # px, between the box of a fold and the drawing of its layer
FOLD_HEADER = 24.0  # px, above that drawing


def box_width(label: str) -> float:
    """The px that the box of a node takes: 7 a character and a margin, 40 to 200."""
    return min(200.0, max(40.0, 7.0 * len(label) + 14.0))


class Kind(IntEnum):
    """What a value is; a chip is read by so many, or from so far away, that it is a label at its readers, not an edge."""

    COMPUTED = 0
    INPUT = 1
    WEIGHT = 2
    CHIP = 3


class Row(NamedTuple):
    """A line of the summary, ready to be shown."""

    label: str
    before: str
    after: str
    note: str = ""


class Pattern(NamedTuple):
    """What makes regions: its name, one sentence about it, and where it is written (`patterns/rms_norm.py:24`)."""

    name: str
    about: str = ""
    line: str = ""


class Region(NamedTuple):
    """Nodes of the result and the source nodes that they stand for."""

    pattern: int
    after: tuple[int, ...]
    before: tuple[int, ...]
    note: str = ""
    saved: str = ""


class Changed(NamedTuple):
    """A node of each side: the same place, but not the same node; the text says what differs."""

    before: int
    after: int
    text: str = ""


class Miss(NamedTuple):
    """What is nearly a pattern's: the source node to look at, and those of like places."""

    pattern: int
    before: int
    expected: str
    found: str
    line: str
    also: tuple[int, ...] = ()


class Item(NamedTuple):
    """A node of a side. `module` is an index in the document's modules, `layer` one in the side's layers, -1 for none."""

    name: str
    op: str
    module: int
    layer: int
    attributes: str
    inputs: tuple[int, ...]  # -1 where one is left out
    outputs: tuple[int, ...]

    @property
    def label(self) -> str:
        """The operator without its domain."""
        return self.op.rpartition(".")[2]


class Tensor(NamedTuple):
    """A value of a side: its name, its type as text, and what it is."""

    name: str
    type: str
    kind: Kind


class Place(NamedTuple):
    """Where an item of a scope has its centre, in px."""

    item: int
    x: float
    y: float


class Edge(NamedTuple):
    """From one item of a scope to another, past some points; None where it comes in at the top or leaves at the bottom."""

    start: int | None
    end: int | None
    bends: tuple[float, ...] = ()


class Scope(NamedTuple):
    """A drawing of one layer of a fold, or of all that is in no layer.

    At the top an item is a node, or -1-n for the box of fold n. In a fold it is a position among a layer's members, so that
    one drawing serves all layers of the fold.
    """

    width: float
    height: float
    places: tuple[Place, ...]
    edges: tuple[Edge, ...]


class Fold(NamedTuple):
    """A run of layers with the same structure, by their indices, and the scope that draws one of them."""

    label: str
    layers: tuple[int, ...]
    scope: int


@dataclass
class Side:
    """One of the two graphs."""

    name: str
    nodes: list[Item] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    layers: list[tuple[str, int]] = field(default_factory=list)  # label, fold
    folds: list[Fold] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)  # of each layer; within a fold they correspond
    scopes: list[Scope] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "nodes": self.nodes,
            "values": [[value.name, value.type, int(value.kind)] for value in self.values],
            "outputs": self.outputs,
            "layers": [{"label": label, "fold": fold} for label, fold in self.layers],
            "folds": [fold._asdict() for fold in self.folds],
            "members": self.members,
            "scopes": [scope._asdict() for scope in self.scopes],
        }


@dataclass
class Document:
    """A diff. All text that comes from a model has passed `shown`."""

    title: str
    before: Side
    after: Side
    summary: list[Row] = field(default_factory=list)
    modules: list[str] = field(default_factory=lambda: [""])
    patterns: list[Pattern] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    def kept(self) -> Iterator[Changed]:
        """Nodes outside regions that have a counterpart, those that are the same among them."""
        yield from (Changed(source, number) for source, number in self.pairs)
        yield from self.changed

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `version` changes when its meaning does."""
        return {
            "version": VERSION,
            "title": self.title,
            "summary": [row._asdict() for row in self.summary],
            "modules": self.modules,
            "patterns": [pattern._asdict() for pattern in self.patterns],
            "sides": {"before": self.before.to_json(), "after": self.after.to_json()},
            "regions": [region._asdict() for region in self.regions],
            "pairs": self.pairs,
            "changed": self.changed,
            "misses": [miss._asdict() for miss in self.misses],
        }


def shown(text: str, most: int = MOST) -> str:
    """A model's text as it may be shown: not too long, and with escapes for what is not seen or turns text around."""
    found = []
    for c in text[: most + 1]:
        category = unicodedata.category(c)
        visible = c == " " or category[0] not in "CZ"
        found.append(c if visible else c.encode("unicode_escape", "replace").decode("ascii"))
    whole = "".join(found)
    return whole if len(whole) <= most else whole[:most] + "…"


def numbers(items: Sequence[int]) -> str:
    """`0-2, 5` of numbers in order."""
    spans: list[list[int]] = []
    for item in items:
        if spans and spans[-1][1] == item - 1:
            spans[-1][1] = item
        else:
            spans.append([item, item])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in spans)
