"""A graph as one side of a document: its nodes and values as text, its layers, and drawings of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fuser import dims
from fuser.diff.document import (
    BOX_HEIGHT,
    FOLD_HEADER,
    FOLD_PADDING,
    Edge,
    Fold,
    Item,
    Kind,
    Place,
    Scope,
    Side,
    Tensor,
    box_width,
    numbers,
    shown,
)
from fuser.diff.folding import Folding
from fuser.diff.layout import Ordering, drawing
from fuser.diff.structure import Structure
from fuser.graph import Value
from fuser.layers import Layer

MANY = 8  # readers from which a value is drawn as chips
LAYERS = 3  # that read it; of a value from outside of layers, two


@dataclass
class Modules:
    """The string table of module paths."""

    names: list[str] = field(default_factory=lambda: [""])
    indices: dict[str, int] = field(default_factory=lambda: {"": 0})

    def index(self, name: str) -> int:
        if name not in self.indices:
            self.indices[name] = len(self.names)
            self.names.append(shown(name))
        return self.indices[name]


def side(
    name: str, structure: Structure, folding: Folding, which: int, modules: Modules, ordering: Ordering | None = None
) -> Side:
    """One side of a document; `which` is 0 for before and 1 for after."""
    layer_of, members = folding.layer_of[which], folding.members[which]
    made = Side(shown(name), members=members)
    values: dict[int, int] = {}
    types: dict[object, str] = {}
    for value in structure.graph.values():
        values[id(value)] = len(made.values)
        kind = (value.dtype, value.shape)
        if kind not in types:
            types[kind] = shown(f"{value.dtype or ''}{dims.text(value.shape)}")
        made.values.append(Tensor(shown(value.name), types[kind], _kind(structure, value, layer_of)))
    for number, node in enumerate(structure.nodes):
        attributes = ", ".join(f"{name}={text}" for name, text in structure.attributes[number].items())
        made.nodes.append(
            Item(
                shown(node.name or (node.origin.sources or (node.outputs[0].name if node.outputs else "",))[0]),
                shown(structure.operators[number]),
                modules.index(node.origin.module),
                layer_of[number],
                shown(attributes),
                tuple(-1 if value is None else values[id(value)] for value in node.inputs),
                tuple(values[id(value)] for value in node.outputs),
            )
        )
    made.outputs = [values[id(value)] for value in structure.graph.outputs]
    fold_of = {unit: fold for fold, run in enumerate(folding.runs) for unit in run}
    made.layers = [(shown(label(unit)), fold_of[number]) for number, unit in enumerate(folding.units)]
    for number, run in enumerate(folding.runs):
        layers = [layer for unit in run for layer in folding.units[unit]]
        made.folds.append(Fold(shown(label(layers)), tuple(run), 1 + number))
    made.scopes = _Drawings(made, ordering).scopes()
    return made


def label(layers: Sequence[Layer]) -> str:
    """`model.layers.1-31`; `layer 3` where the stack has no name."""
    span = numbers([layer.index for layer in layers])
    return f"{layers[0].stack}.{span}" if layers[0].stack else f"layer{'s' if len(layers) > 1 else ''} {span}"


def _kind(structure: Structure, value: Value, layer_of: Sequence[int]) -> Kind:
    if value.constant is not None:
        return Kind.WEIGHT
    if value.producer is None:
        return Kind.INPUT
    readers = value.consumers
    layers = {layer_of[structure.number[reader]] for reader in readers} - {-1}
    enough = LAYERS if layer_of[structure.number[value.producer]] >= 0 else LAYERS - 1
    return Kind.CHIP if len(layers) >= enough or len(readers) > MANY else Kind.COMPUTED


class _Drawings:
    """Draws the scopes of a side: the top, and one layer of each fold."""

    def __init__(self, side: Side, ordering: Ordering | None) -> None:
        self.side, self.ordering = side, ordering
        makers = {output: number for number, item in enumerate(side.nodes) for output in item.outputs}
        self.links = [  # (maker, reader) of each value that is drawn as an edge
            (makers[given], number)
            for number, item in enumerate(side.nodes)
            for given in dict.fromkeys(item.inputs)
            if given >= 0 and given in makers and side.values[given].kind is Kind.COMPUTED
        ]

    def scopes(self) -> list[Scope]:
        by_layer: dict[int, list[tuple[int, int]]] = {}
        for maker, reader in self.links:
            for layer in {self.side.nodes[maker].layer, self.side.nodes[reader].layer}:
                by_layer.setdefault(layer, []).append((maker, reader))
        inner = [
            self._layer(self.side.members[fold.layers[0]], by_layer.get(fold.layers[0], [])) for fold in self.side.folds
        ]
        return [self._top(inner), *inner]

    def _size(self, number: int) -> tuple[float, float]:
        return box_width(self.side.nodes[number].label), BOX_HEIGHT

    def _layer(self, members: Sequence[int], links: Sequence[tuple[int, int]]) -> Scope:
        """One layer: what comes from elsewhere comes in at the top, what goes elsewhere leaves at the bottom."""
        place = {number: position for position, number in enumerate(members)}
        sizes = [self._size(number) for number in members]
        outside: dict[tuple[str, int], int] = {}
        edges: dict[tuple[int, int], None] = {}
        for maker, reader in links:
            start, end = place.get(maker), place.get(reader)
            if start is None:
                start = outside.setdefault(("in", maker), len(members) + len(outside))
            if end is None:  # one line for all that goes elsewhere
                end = outside.setdefault(("out", maker), len(members) + len(outside))
            edges[start, end] = None
        sizes += [(0.0, 0.0)] * len(outside)
        first = [vertex for (kind, _), vertex in outside.items() if kind == "in"]
        last = [vertex for (kind, _), vertex in outside.items() if kind == "out"]
        drawn = drawing(sizes, list(edges), first=first, last=last, ordering=self.ordering)
        made = []
        for (start, end), bends in zip(edges, drawn.bends, strict=True):
            begins, ends = start < len(members), end < len(members)
            above = () if begins else (drawn.centres[start][0], 0.0, *drawn.centres[start])
            below = () if ends else (*drawn.centres[end], drawn.centres[end][0], drawn.height)
            made.append(Edge(start if begins else None, end if ends else None, (*above, *bends, *below)))
        places = tuple(Place(position, *drawn.centres[position]) for position in range(len(members)))
        return Scope(drawn.width, drawn.height, places, tuple(made))

    def _top(self, inner: Sequence[Scope]) -> Scope:
        side = self.side
        items = [number for number, item in enumerate(side.nodes) if item.layer < 0]
        sizes = [self._size(number) for number in items]
        vertex = {number: v for v, number in enumerate(items)}
        for number, fold in enumerate(side.folds):
            own = [member for layer in fold.layers for member in side.members[layer]]
            if not own:
                continue
            vertex.update(dict.fromkeys(own, len(items)))
            items.append(-1 - number)
            scope = inner[number]
            sizes.append((scope.width + 2 * FOLD_PADDING, scope.height + FOLD_HEADER + FOLD_PADDING))
        edges = dict.fromkeys(
            (vertex[maker], vertex[reader]) for maker, reader in self.links if vertex[maker] != vertex[reader]
        )
        drawn = drawing(sizes, list(edges), ordering=self.ordering)
        places = tuple(Place(item, *centre) for item, centre in zip(items, drawn.centres, strict=True))
        made = (Edge(items[a], items[b], bends) for (a, b), bends in zip(edges, drawn.bends, strict=True))
        return Scope(drawn.width, drawn.height, places, tuple(made))
