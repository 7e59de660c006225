"""The layers of two graphs that are aligned, and which of them are so alike that one stands for all."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fuser.codegen.plan import repeated
from fuser.diff.alignment import Alignment
from fuser.diff.structure import Structure, Table
from fuser.layers import Layer, Layers, Part, Step
from fuser.pattern import COMMUTATIVE


@dataclass
class Folding:
    """What is drawn once, the same on both sides.

    Attributes:
        units: layers by number; several together where layers of different kinds take turns.
        layer_of: of each side the unit of each node; -1 for none.
        members: of each side the nodes of each unit; in a run they correspond.
        runs: of units with the same structure.
        signatures: equal for units with the same structure.
    """

    units: list[list[Layer]]
    layer_of: tuple[list[int], list[int]]
    members: tuple[list[list[int]], list[list[int]]]
    runs: list[list[int]]
    signatures: list[Hashable]


def layers_of(steps: Sequence[Step]) -> Layers:
    """The layers of a graph of which nothing is known but its nodes."""
    named = Layers(steps, [])
    if named.named:
        return named
    depths: dict[str, list[int]] = defaultdict(list)
    for step in steps:
        depths[step.op].append(step.depth)
    best = max(depths, key=lambda op: _evenness(depths[op]), default=None)
    if best is None or _evenness(depths[best])[0] < 1:
        return named
    return Layers(steps, [Part(step.op, step.sources, True) for step in steps if step.op == best])


def _evenness(depths: Sequence[int]) -> tuple[float, int]:
    """How often the commonest distance between neighbours is theirs, and how many they are."""
    spans = Counter(after - before for before, after in pairwise(sorted(depths)))
    if len(depths) < 2 or spans[0]:
        return (0.0, 0)
    return (spans.most_common(1)[0][1] / (len(depths) - 1), len(depths))


def folding(
    before: Structure, after: Structure, steps: tuple[list[Step], list[Step]], layers: Layers, alignment: Alignment
) -> Folding:
    """The layers of two aligned graphs: those of the first, and of the second by what its nodes stand for.

    Args:
        steps: of both graphs.
        layers: of the first graph.
    """
    every = [[layer] for layer in layers.all]
    index = {layer: number for number, (layer,) in enumerate(every)}
    first = [index.get(layer, -1) if layer is not None else -1 for layer in map(layers.own, range(len(before.nodes)))]
    layer_of = (first, _carried(after, first, alignment))
    single = _folded(every, layer_of, steps, alignment)
    found = repeated(single.units, list(zip(map(_stack, single.units), single.signatures, strict=True)))
    if all(len(period) == 1 for _, period in found):
        return single
    merged = [number for count, period in found for number in count * [len(period)]]
    units, unit_of = list[list[Layer]](), list[int]()
    for length in merged:
        units.append([layer for unit in every[len(unit_of) : len(unit_of) + length] for layer in unit])
        unit_of += length * [len(units) - 1]
    first, second = ([unit_of[layer] if layer >= 0 else -1 for layer in side] for side in layer_of)
    return _folded(units, (first, second), steps, alignment)


def _stack(unit: Sequence[Layer]) -> str:
    return unit[0].stack


def _folded(
    units: list[list[Layer]],
    layer_of: tuple[list[int], list[int]],
    steps: tuple[list[Step], list[Step]],
    alignment: Alignment,
) -> Folding:
    """Layers of the same structure, one after another, in runs; their members put in corresponding order."""
    keys = [_keys(steps[side], layer_of[side]) for side in (0, 1)]
    members: tuple[list[list[int]], list[list[int]]] = ([[] for _ in units], [[] for _ in units])
    for own, found, inside in zip(keys, members, layer_of, strict=True):
        for number in sorted(own, key=own.__getitem__):
            found[inside[number]].append(number)
    signatures = _signatures(members, keys, layer_of, alignment)
    runs: list[list[int]] = []
    for number, unit in enumerate(units):
        before = runs[-1][-1] if runs else -1
        alike = before >= 0 and signatures[before] == signatures[number]
        if alike and _stack(units[before]) == _stack(unit):
            runs[-1].append(number)
        else:
            runs.append([number])
    for found in members:
        for run in runs:
            order = sorted(range(len(found[run[0]])), key=found[run[0]].__getitem__)
            for number in run:
                found[number] = [found[number][place] for place in order]
    return Folding(units, layer_of, members, runs, signatures)


def _carried(after: Structure, first: Sequence[int], alignment: Alignment) -> list[int]:
    """The layer of each node of the second graph: that of at least half of what it stands for, else that of its readers,
    where they have one, else that of what it reads."""
    stands_for: dict[int, set[int]] = defaultdict(set)
    for region in alignment.regions:
        for number in region.after:
            stands_for[number].update(region.before)
    for change in alignment.kept():
        stands_for[change.after].add(change.before)
    found: list[int | None] = []
    for number in range(len(after.nodes)):
        if not stands_for[number]:
            found.append(None)
            continue
        layer, count = Counter(first[source] for source in sorted(stands_for[number])).most_common(1)[0]
        found.append(layer if 2 * count >= len(stands_for[number]) else -1)
    for number in reversed(range(len(found))):
        if found[number] is None:
            readers = {found[reader] for _, reader, _ in after.readers(number)}
            found[number] = readers.pop() if len(readers) == 1 else None
    for number, node in enumerate(after.nodes):
        if found[number] is None:
            makers = [found[maker] for maker in map(after.maker, node.inputs) if maker is not None]
            found[number] = max((layer for layer in makers if layer is not None), default=-1)
    return [-1 if layer is None else layer for layer in found]


def _keys(steps: Sequence[Step], layer_of: Sequence[int]) -> dict[int, int]:
    """What each step of a layer computes of what the layer is given; layers with equal keys have the same structure.

    Keys of one graph are comparable among its layers. What several layers read is told apart, the rest of what a layer is
    given only by the order in which it is read.
    """
    read_by: dict[int, set[int]] = defaultdict(set)
    for number, step in enumerate(steps):
        for given in step.inputs:
            if isinstance(given, tuple):
                read_by[given[0]].add(layer_of[number])
    table, found = Table(), dict[int, int]()
    times: dict[int, Counter[Hashable]] = defaultdict(Counter)
    handed: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for number, step in enumerate(steps):
        layer = layer_of[number]
        if layer < 0:
            continue
        inputs: list[Hashable] = []
        for given in step.inputs:
            if isinstance(given, str):
                inputs.append(given)
            elif layer_of[given[0]] == layer:
                inputs.append((found[given[0]], given[1]))
            elif layer_of[given[0]] < 0 and len(read_by[given[0]] - {-1}) > 1:
                inputs.append(("shared", *given))
            else:
                inputs.append(("given", handed[layer].setdefault(given, len(handed[layer]))))
        if step.op in COMMUTATIVE:
            inputs.sort(key=str)
        key: tuple[Hashable, ...] = (step.op, step.attributes, step.given_out, tuple(inputs))
        times[layer][key] += 1  # the same of other weights is another thing
        found[number] = table.number((key, times[layer][key]))
    return found


def _signatures(
    members: Sequence[Sequence[Sequence[int]]],
    keys: Sequence[dict[int, int]],
    layer_of: tuple[list[int], list[int]],
    alignment: Alignment,
) -> list[Hashable]:
    """What must be equal for two layers to be folded: the structure of both sides, and what of one is what of the other."""
    told: tuple[dict[int, list[Hashable]], dict[int, list[Hashable]]] = (defaultdict(list), defaultdict(list))

    def tell(side: int, number: int, others: Sequence[int], what: str) -> None:
        own = layer_of[side][number]
        inside = tuple(sorted(keys[1 - side][n] for n in others if layer_of[1 - side][n] == own)) if own >= 0 else ()
        told[side][number].append((what, len(others) if inside else 0, inside))

    for region in alignment.regions:
        for number in region.before:
            tell(0, number, region.after, region.kind)
        for number in region.after:
            tell(1, number, region.before, region.kind)
    for change in alignment.kept():
        tell(0, change.before, (change.after,), change.text)
        tell(1, change.after, (change.before,), change.text)
    return [
        tuple(
            tuple((keys[side][n], tuple(sorted(told[side][n], key=str))) for n in members[side][layer])
            for side in (0, 1)
        )
        for layer in range(len(members[0]))
    ]
