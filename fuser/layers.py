"""The repeated layers of a model: which layer each node belongs to, and where one layer is not like the others.

For reports only: module paths that exporters left are read here, and no rewrite depends on what they say. A graph without
them is cut where its fused constructs repeat.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fuser.dims import text
from fuser.graph import Graph, Node, Value
from fuser.pattern import COMMUTATIVE

HOME_SHARE = 0.75  # how much of a construct lies in the module it is said to be in
OFTEN = 0.75  # ... of how often others come: about as often
SMALL = 8  # whole numbers that are compared one by one: axes, bounds, shapes
SHARED_LAYERS = 3  # what so many layers read (a mask, rotary tables) is no layer's own


@dataclass(frozen=True, order=True)
class Layer:
    """One layer: the path of the stack it stands in (`model.layers`; "" without metadata), and its number there."""

    stack: str
    index: int


@dataclass(frozen=True, eq=False)
class Step:
    """A node of the graph as it was read, before anything was done to it."""

    op: str
    attributes: tuple[str, ...]
    inputs: tuple["tuple[int, int] | str", ...]  # the (step, output) that makes an input, or what is given there
    given_out: bool
    sources: tuple[str, ...]
    module: str
    depth: int


def steps(graph: Graph) -> list[Step]:
    """The nodes of a graph, in order, in a form that outlives what is done to the graph."""
    numbers: dict[Node, int] = {}
    found: list[Step] = []
    for node in graph.nodes:
        inputs = tuple(_input(value, numbers) for value in node.inputs)
        before = [found[given[0]].depth for given in inputs if isinstance(given, tuple)]
        found.append(
            Step(
                f"{node.domain}.{node.op}" if node.domain else node.op,
                tuple(f"{name}={value}" for name, value in sorted(node.attributes.items())),
                inputs,
                any(value.is_output for value in node.outputs),
                node.origin.sources or (node.name,),
                node.origin.module,
                1 + max(before, default=0),
            )
        )
        numbers[node] = len(numbers)
    return found


def _input(value: Value | None, numbers: Mapping[Node, int]) -> tuple[int, int] | str:
    if value is None:
        return "none"
    if value.producer is not None:
        return numbers[value.producer], value.index
    if value.constant is not None:
        kind = f"constant {value.dtype}{text(value.shape)}"
        if value.dtype is not None and not value.dtype.is_float and value.constant.size <= SMALL:
            return f"{kind} = {value.constant.numpy().tolist()}"
        return kind if value.scalar is None else f"{kind} = {value.scalar:g}"
    return f"input {value.dtype} of rank {value.rank}"


class Part(NamedTuple):
    """A construct as layers see it: what it is, the source nodes it stands for, and whether it was fused."""

    kind: str
    sources: tuple[str, ...]
    fused: bool


class Difference(NamedTuple):
    """Where a layer parts from another one: the steps of each, either perhaps missing."""

    here: Step
    there: Step | None


class Layers:
    """The layers of one model.

    Args:
        steps: the graph as it was read.
        parts: what was fused in it, and what nearly was.
    """

    def __init__(self, steps: Sequence[Step], parts: Sequence[Part]) -> None:
        self.steps = steps
        self._step_of = {source: number for number, step in enumerate(steps) for source in step.sources}
        self._relative: dict[str, str] = {}
        self.of_steps = self._by_modules()
        self.named = any(layer is not None for layer in self.of_steps)
        if not self.named:
            self.of_steps = self._by_structure(parts)
        self._read_by: dict[int, set[Layer]] = defaultdict(set)
        for layer, step in zip(self.of_steps, steps, strict=True):
            for given in step.inputs:
                if isinstance(given, tuple) and layer is not None:
                    self._read_by[given[0]].add(layer)
        readers = self._readers = defaultdict[int, set[int]](set)
        for number, step in enumerate(steps):
            for given in step.inputs:
                if isinstance(given, tuple):
                    readers[given[0]].add(number)
        self._shared: set[int] = set()
        for number in reversed(range(len(steps))):
            enough = 2 if self.of_steps[number] is None else SHARED_LAYERS
            if len(self._read_by.get(number, ())) >= enough or (readers[number] and readers[number] <= self._shared):
                self._shared.add(number)
        self._members: dict[Layer, list[int]] = defaultdict(list)
        for number, layer in enumerate(self.of_steps):
            if layer is not None and number not in self._shared:
                self._members[layer].append(number)
        self._table: dict[Hashable, int] = {}
        self._computed: dict[Layer, dict[int, int]] = {}

    @property
    def all(self) -> list[Layer]:
        """Every layer: stacks as they come in the graph, and their layers by number."""
        stacks = list(dict.fromkeys(layer.stack for layer in self.of_steps if layer is not None))
        found = {layer for layer in self.of_steps if layer is not None}
        return sorted(found, key=lambda layer: (stacks.index(layer.stack), layer.index))

    def home(self, sources: Sequence[str]) -> str:
        """The deepest module that holds most of some source nodes."""
        modules = [self.steps[number].module for number in self._numbers(sources)]
        counts: Counter[tuple[str, ...]] = Counter()
        paths = [tuple(module.split(".")) for module in modules if module]
        for path in paths:
            counts.update(path[:length] for length in range(1, len(path) + 1))
        most = sorted((len(path), path) for path, count in counts.items() if count >= HOME_SHARE * len(paths))
        return ".".join(most[-1][1]) if most else ""

    def of(self, sources: Sequence[str]) -> Layer | None:
        """The layer that some source nodes belong to: that of their home, or of half of them; unnamed, of the last."""
        numbers = self._numbers(sources)
        if not numbers:
            return None
        if not self.named:
            last = max(numbers, key=lambda number: self.steps[number].depth)
            return None if last in self._shared else self.of_steps[last]
        found, count = Counter(self.of_steps[number] for number in numbers).most_common(1)[0]
        return self._split(self.home(sources)) or (found if 2 * count >= len(numbers) else None)

    def own(self, number: int) -> Layer | None:
        """The layer of a step; of what several layers share, none."""
        return None if number in self._shared else self.of_steps[number]

    def within(self, module: str) -> str:
        """A module's path from its layer on; the whole path outside layers."""
        return self._relative.get(module, "") if self._split(module) is not None else module

    def depth(self, sources: Iterable[str]) -> int:
        """How deep in the graph the last of some source nodes stands."""
        return max((self.steps[number].depth for number in self._numbers(sources)), default=0)

    def size(self, sources: Sequence[str]) -> int:
        """How many nodes of the graph some source nodes are."""
        return len(self._numbers(sources))

    def _numbers(self, sources: Iterable[str]) -> list[int]:
        return sorted({self._step_of[source] for source in sources if source in self._step_of})

    # Layers by the paths of modules.

    def _by_modules(self) -> list[Layer | None]:
        indices: dict[str, set[int]] = defaultdict(set)
        for module in {step.module for step in self.steps}:
            for stack, index, _, _ in _numbered(module):
                indices[stack].add(index)
        self._stacks = {stack for stack, found in indices.items() if len(found) > 2}
        own = [self._split(step.module) for step in self.steps]
        # A node that nobody named lies where what it reads does.
        for number, step in enumerate(self.steps):
            if not step.module:
                given = [own[i] for i, _ in (g for g in step.inputs if isinstance(g, tuple))]
                own[number] = max((layer for layer in given if layer is not None), default=None)
        return own

    def _split(self, module: str) -> Layer | None:
        """The outermost layer in a path. A number by itself is one; a name that ends in one only where it counts on."""
        for stack, index, alone, rest in _numbered(module):
            if alone or stack in self._stacks:
                self._relative[module] = rest
                return Layer(stack, index)
        return None

    # Layers by the constructs that repeat.

    def _by_structure(self, parts: Sequence[Part]) -> list[Layer | None]:
        """A layer begins at the construct before each one of the kind that comes back most regularly."""
        ordered = sorted(parts, key=lambda part: self.depth(part.sources))
        spine = self._spine(ordered)
        counts = Counter(part.kind for part in parts)
        leaders: list[tuple[Part, Part]] = []
        before: Part | None = None
        for part in ordered:
            if part.kind == spine:
                leaders.append((before if before is not None and before.kind != spine else part, part))
            if counts[part.kind] > 1 or not part.fused or not leaders:  # what comes once, a mask, begins no layer
                before = part
        kinds = Counter(leader.kind for leader, _ in leaders)
        starts = []
        for leader, part in leaders:
            usual = kinds[leader.kind] > 1 or leader is leaders[0][0] or not leader.fused
            numbers = self._numbers((leader if usual else part).sources)
            starts.append(min(self.steps[number].depth for number in numbers))
        if not starts:
            return [None] * len(self.steps)
        ends = [*starts[1:], starts[-1] + _regularity(starts)[1]]
        first, last = leaders[0]
        return self._cut(starts[0], ends, set(self._numbers((*first.sources, *last.sources))))

    def _cut(self, start: int, ends: Sequence[int], first: set[int]) -> list[Layer | None]:
        """The layer of each step by its depth; of what does not come from the `first` steps, that of its only reader."""
        behind = set(first)
        found: list[Layer | None] = []
        for number, step in enumerate(self.steps):
            if any(isinstance(given, tuple) and given[0] in behind for given in step.inputs):
                behind.add(number)
            at = bisect_right(ends, step.depth)
            inside = number in behind and at < len(ends) and step.depth >= start
            found.append(Layer("", at) if inside else None)
        readers: dict[int, set[Layer | None]] = defaultdict(set)
        for number in reversed(range(len(self.steps))):
            if number not in behind and len(readers[number]) == 1:
                (found[number],) = readers[number]
            for given in self.steps[number].inputs:
                if isinstance(given, tuple):
                    readers[given[0]].add(found[number])
        return found

    def _spine(self, ordered: Sequence[Part]) -> str | None:
        """The kind whose places are most evenly spaced, of those that come about as often as most kinds do."""
        depths: dict[str, list[int]] = defaultdict(list)
        for part in ordered:
            depths[part.kind].append(self.depth(part.sources))
        best: tuple[tuple[float, int], str] | None = None
        for kind, own in depths.items():
            often = sum(len(other) >= OFTEN * len(own) for other in depths.values())
            rarely = sum(len(own) >= OFTEN * len(other) for other in depths.values())
            if len(own) > 1 and 2 * min(often, rarely) > len(depths):
                order = _regularity(own)[0], len(own)
                if best is None or order > best[0]:
                    best = order, kind
        return best[1] if best is not None else None

    # Where a layer is not like another.

    def usual(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those of some layers that compute the same, where that is most of them."""
        most = max(self.alike(layers), key=len, default=[])
        return most if 2 * len(most) > len(layers) else []

    def alike(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Some layers, those together that compute the same."""
        found: dict[frozenset[tuple[int, int]], list[Layer]] = defaultdict(list)
        for layer in layers:
            found[frozenset(Counter(self._keys(layer).values()).items())].append(layer)
        return list(found.values())

    def differences(self, layer: Layer, other: Layer) -> list[Difference]:
        """Where `layer` parts from `other`: its steps without a counterpart there, though all that they read has one."""
        here, there = self._keys(layer), self._keys(other)
        odd, missing = _without(here, there), list(_without(there, here))
        found = []
        for number in odd:
            step = self.steps[number]
            if any(isinstance(given, tuple) and given[0] in odd for given in step.inputs):
                continue
            same = [other for other in missing if self.steps[other].op == step.op]
            found.append(Difference(step, self.steps[(same or missing)[0]] if missing else None))
        return found

    def _keys(self, layer: Layer) -> dict[int, int]:
        """What each step of a layer computes of what the layer is given; equal keys, equal computations."""
        if layer in self._computed:
            return self._computed[layer]
        found: dict[int, int] = {}
        times: Counter[Hashable] = Counter()
        handed: dict[tuple[int, int], int] = {}
        for number in self._members[layer]:
            step = self.steps[number]
            inputs: list[Hashable] = []
            for given in step.inputs:
                if isinstance(given, str):
                    inputs.append(given)
                elif given[0] in found:
                    inputs.append((found[given[0]], given[1]))
                elif given[0] in self._shared:
                    inputs.append(("shared", *given))
                else:  # what earlier layers hand on, in the order in which it is first read
                    inputs.append(("given", handed.setdefault(given, len(handed))))
            if step.op in COMMUTATIVE:
                inputs.sort(key=str)
            key: tuple[Hashable, ...] = (step.op, step.attributes, step.given_out, tuple(inputs))
            times[key] += 1  # the same of other weights is another thing
            found[number] = self._table.setdefault((key, times[key]), len(self._table))
        self._computed[layer] = found
        return found

    def around(self, step: Step) -> set[str]:
        """The source nodes of a step and of those that read what it makes."""
        numbers = self._numbers(step.sources)
        numbers += [reader for number in numbers for reader in self._readers[number]]
        return {source for number in numbers for source in self.steps[number].sources}

    def describe(self, difference: Difference) -> tuple[str, str]:
        """What stands in the other layer and what in this one, in as many words as it takes to tell them apart."""
        here, there = difference
        if there is None:
            return "nothing there", self._text(here, 0)
        pairs = ((self._text(there, detail), self._text(here, detail)) for detail in range(4))
        return next((pair for pair in pairs if pair[0] != pair[1]), (self._text(there, 0), self._text(here, 0)))

    def _text(self, step: Step, detail: int) -> str:
        """`Concat(Neg, Split)`; from detail 1 on with attributes, from 2 on with names and numbers for what it reads."""
        inputs = []
        for given in step.inputs:
            if isinstance(given, str):
                kind, _, exact = given.partition(" ")
                inputs.append(exact.rpartition(" = ")[2] if detail > 1 and kind == "constant" else kind)
            else:
                maker = self.steps[given[0]]
                inputs.append(maker.sources[0] if detail > 1 else maker.op)
        shown = ", ".join([*inputs, *(step.attributes if detail else ())])
        return f"{step.op}({shown})" + (", given out" if detail > 2 and step.given_out else "")


def _without(keys: dict[int, int], others: dict[int, int]) -> dict[int, None]:
    """The steps that others have no equal of, each other one counted once."""
    left = Counter(others.values())
    found: dict[int, None] = {}
    for number, key in keys.items():
        if left[key] > 0:
            left[key] -= 1
        else:
            found[number] = None
    return found


def _regularity(depths: Sequence[int]) -> tuple[float, int]:
    """The share of the commonest distance between neighbours, and that distance."""
    spans = Counter(after - before for before, after in pairwise(depths))
    span, count = spans.most_common(1)[0]
    return (count / (len(depths) - 1) if span else 0.0), span


_NUMBERED = re.compile(r"(\D*?)[_\[]*(\d{1,9})\]?_?")
LONGEST = 128  # characters of a component that is looked at for a number


def _numbered(module: str) -> list[tuple[str, int, bool, str]]:
    """The numbered components of a path, outermost first: (stack, number, whether the component is only that, the rest)."""
    found = []
    path = module.split(".")
    for place, component in enumerate(path):
        match = _NUMBERED.fullmatch(component) if len(component) <= LONGEST else None
        if match is not None:
            stem = match[1].strip("_")
            stack = ".".join([*path[:place], *([stem] if stem else [])])
            found.append((stack, int(match[2]), component.isdecimal(), ".".join(path[place + 1 :])))
    return found
