"""What was fused and what was not, layer by layer, and the reasons, the likeliest first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fuser.layers import Difference, Layer, Layers, Part, Step
from fuser.rewriting import Miss, Outcome, Place

VERSION = 1
DIFFERENCE = "difference"
KINDS = ("check", "escape", "structure", DIFFERENCE)  # of reasons, those of a pattern by rank
MAJORITY_OF = 3  # fewer layers are no measure of one another
DIFFERENCES = 3  # of one layer that are told


@dataclass(eq=False)
class Reason:
    """Why something is not fused: where the graph and a pattern part, or a layer and the other layers.

    Attributes:
        kind: `check`, `escape` or `structure`, by the pattern; `difference`, by the other layers.
        missed: the constructs that are not there for it; none where a layer is different and fused all the same.
        at: the source nodes of the node to look at, its name first.
        modules: of each place.
        layers: of each place; None outside of any.
        odd: whether most layers are not so.
    """

    kind: str
    missed: tuple[str, ...]
    at: tuple[str, ...]
    expected: str
    found: str
    line: str
    matched: int
    total: int
    modules: tuple[str, ...]
    layers: tuple[Layer | None, ...]
    odd: bool = False

    @property
    def order(self) -> tuple[Any, ...]:
        """The smaller, the likelier to be what is wrong."""
        return (not self.missed, not self.odd, KINDS.index(self.kind), -self.matched / max(1, self.total))

    def to_json(self) -> dict[str, Any]:
        return {
            "reason": self.kind,
            "missed": list(self.missed),
            "node": self.at[0],
            "nodes": list(self.at),
            "matched": self.matched,
            "total": self.total,
            "pattern": self.line,
            "expected": self.expected,
            "found": self.found,
            "places": [
                {"module": module, **layer_json(layer)}
                for module, layer in zip(self.modules, self.layers, strict=True)
            ],
            "odd": self.odd,
        }


@dataclass(eq=False)
class Construct:
    """Something that was fused, or was missed for a reason."""

    kind: str
    layer: Layer | None
    module: str
    sources: tuple[str, ...]
    size: int  # in nodes
    line: str
    reason: Reason | None = None


@dataclass(eq=False)
class Group:
    """Layers with the same contents, which are those of the first."""

    layers: list[Layer]
    constructs: list[Construct]
    usual: "Group | None" = None  # what most layers of the stack are like, where these are not


@dataclass(eq=False)
class Explanation:
    """The explanation of one run."""

    model: str
    nodes: int
    layers: Layers
    constructs: list[Construct] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """All layers in groups of the same contents: of each stack first what most are like, then the others in order."""
        found: list[Group] = []
        members: dict[Layer, list[Construct]] = {layer: [] for layer in self.layers.all}
        for construct in self.constructs:
            if construct.layer is not None:
                members.setdefault(construct.layer, []).append(construct)
        for stack in dict.fromkeys(layer.stack for layer in members):
            alike: dict[Any, Group] = {}
            for layer, constructs in members.items():
                if layer.stack == stack:
                    group = alike.setdefault(self._contents(constructs), Group([], constructs))
                    group.layers.append(layer)
            most = max(alike.values(), key=lambda group: len(group.layers))
            for group in alike.values():
                group.usual = most if group is not most and len(most.layers) > 1 else None
            found += sorted(alike.values(), key=lambda group: group is not most)
        return found

    def _contents(self, constructs: Sequence[Construct]) -> frozenset[Any]:
        return frozenset(
            Counter(
                (c.kind, self.layers.within(c.module), c.size if c.reason is None else id(c.reason))
                for c in constructs
            ).items()
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; docs/explain.md says what it holds, and `version` changes when its meaning does."""
        ranks = {id(reason): rank for rank, reason in enumerate(self.reasons, 1)}
        return {
            "version": VERSION,
            "model": self.model,
            "nodes": self.nodes,
            "layers": [
                {
                    "stack": group.layers[0].stack,
                    "layers": [layer.index for layer in group.layers],
                    "usual": group.usual is None,
                }
                for group in self.groups
            ],
            "constructs": [
                {
                    "kind": construct.kind,
                    "status": "fused" if construct.reason is None else "missed",
                    **layer_json(construct.layer),
                    "module": construct.module,
                    "nodes": list(construct.sources),
                    "pattern": construct.line,
                    "rank": None if construct.reason is None else ranks[id(construct.reason)],
                }
                for construct in self.constructs
            ],
            "reasons": [{"rank": ranks[id(reason)], **reason.to_json()} for reason in self.reasons],
        }


def layer_json(layer: Layer | None) -> dict[str, Any]:
    """The stack and number of a layer; None outside of any."""
    return {"stack": None if layer is None else layer.stack, "layer": None if layer is None else layer.index}


class _Near(NamedTuple):
    """One place of a near miss."""

    miss: Miss
    place: Place
    layer: Layer | None


def explain(model: str, nodes: int, steps: Sequence[Step], outcome: Outcome) -> Explanation:
    """Explains what rewriting did.

    Args:
        model: its name, for people.
        nodes: how many the file has.
        steps: the graph as it was read.
        outcome: what matching and rewriting did.
    """
    parts = [Part(fused.kind, fused.sources, True) for fused in outcome.constructs]
    parts += [Part(miss.fusion, place.sources, False) for miss in outcome.misses for place in miss.places]
    layers = Layers(steps, parts)
    made = Explanation(model, nodes, layers)
    for fused in outcome.constructs:
        layer, module = layers.of(fused.sources), layers.home(fused.sources)
        made.constructs.append(
            Construct(fused.kind, layer, module, fused.sources, layers.size(fused.sources), fused.line)
        )
    _Reasoning(made, outcome).find()
    made.constructs.sort(key=lambda construct: layers.depth(construct.sources))
    return made


class _Reasoning:
    """Finds the reasons of an explanation whose fused constructs are there."""

    def __init__(self, explanation: Explanation, outcome: Outcome) -> None:
        self.explanation, self.layers = explanation, explanation.layers
        self.near = [
            _Near(miss, place, self.layers.of((*place.sources, *place.at)))
            for miss in outcome.misses
            for place in miss.places
        ]
        self.kinds: dict[str, dict[str, None]] = {}  # what an operator is counted as
        for fused in outcome.constructs:
            self.kinds.setdefault(fused.operator, {})[fused.kind] = None
        self.found: list[tuple[Reason, list[_Near]]] = []

    def find(self) -> None:
        told: set[int] = set()
        for stack in dict.fromkeys(layer.stack for layer in self.layers.all):
            members = [layer for layer in self.layers.all if layer.stack == stack]
            for reason, near in self._odd_ones(members):
                told.update(map(id, near))
                self.found.append((reason, near))
        alike: dict[int, list[_Near]] = {}
        for near in self.near:
            if id(near) not in told:
                alike.setdefault(id(near.miss), []).append(near)
        self.found += [(self._of_pattern(near), near) for near in alike.values()]
        self.found.sort(key=lambda pair: pair[0].order)
        self.explanation.reasons = [reason for reason, _ in self.found]
        for reason, near in self.found:
            self.explanation.constructs += self._missed(reason, near)

    def _of_pattern(self, near: Sequence[_Near], missed: tuple[str, ...] = (), *, odd: bool = False) -> Reason:
        """What a pattern says of like places."""
        miss, place, _ = near[0]
        return Reason(
            KINDS[miss.rank],
            missed or (self._kind(miss.fusion),),
            place.at,
            place.expected,
            place.found,
            miss.line,
            miss.matched,
            miss.total,
            tuple(self._module(one.place) for one in near),
            tuple(one.layer for one in near),
            odd,
        )

    def _kind(self, operator: str, among: Sequence[str] = ()) -> str:
        """What a missed operator would have been counted as: the one that is lacking, if that is clear."""
        kinds = self.kinds.get(operator, {})
        lacking = [kind for kind in kinds if kind in among] or list(kinds)
        return lacking[0] if len(lacking) == 1 else operator

    def _module(self, place: Place) -> str:
        return self.layers.home(place.sources) or place.module

    def _missed(self, reason: Reason, near: Sequence[_Near]) -> Iterator[Construct]:
        """The constructs that are missed for a reason, each at its place."""
        places = {self._kind(one.miss.fusion, reason.missed): [] for one in near}
        for one in near:
            places[self._kind(one.miss.fusion, reason.missed)].append(one)
        for kind in reason.missed:
            for one in places.get(kind, ()):
                sources = one.place.sources
                size = self.layers.size(sources)
                yield Construct(kind, one.layer, self._module(one.place), sources, size, one.miss.line, reason)
            if kind not in places:
                size = self.layers.size(reason.at)
                yield Construct(kind, reason.layers[0], reason.modules[0], reason.at, size, reason.line, reason)

    # One layer among others.

    def _odd_ones(self, members: Sequence[Layer]) -> Iterator[tuple[Reason, list[_Near]]]:
        """The reasons in layers that are not like most layers of their stack."""
        usual = self._usual(members)
        if len(members) < MAJORITY_OF or not usual:
            return
        alike = self.layers.usual(usual)
        for layer in members:
            own = [near for near in self.near if near.layer == layer and layer not in usual]
            lacking = () if layer in usual else tuple((self._fused(usual[0]) - self._fused(layer)).elements())
            differences = self._differences(layer, alike, certain=bool(own)) if layer not in alike else []
            if differences:
                yield from self._by_difference(layer, alike[0], differences, own, tuple(dict.fromkeys(lacking)))
            else:
                for miss in {id(near.miss): near.miss for near in own}.values():
                    near = [one for one in own if one.miss is miss]
                    yield self._of_pattern(near, (self._kind(miss.fusion, lacking),), odd=True), near

    def _usual(self, members: Sequence[Layer]) -> list[Layer]:
        """The layers with the contents that most have."""
        contents: dict[Any, list[Layer]] = {}
        for layer in members:
            fused = Counter(
                (c.kind, self.layers.within(c.module), c.size)
                for c in self.explanation.constructs
                if c.layer == layer
            )
            missed = Counter(id(near.miss) for near in self.near if near.layer == layer)
            contents.setdefault(frozenset([*fused.items(), *missed.items()]), []).append(layer)
        most = max(contents.values(), key=len)
        return most if 2 * len(most) > len(members) else []

    def _fused(self, layer: Layer) -> Counter[str]:
        return Counter(c.kind for c in self.explanation.constructs if c.layer == layer and c.reason is None)

    def _differences(self, layer: Layer, alike: Sequence[Layer], *, certain: bool) -> list[Difference]:
        """Where a layer parts from the nearest of the others. Where a stack is cut is not certain without metadata."""
        if not alike or not (self.layers.named or certain):
            return []
        nearest = min(alike, key=lambda other: abs(other.index - layer.index))
        return self.layers.differences(layer, nearest)[:DIFFERENCES]

    def _by_difference(
        self, layer: Layer, other: Layer, differences: Sequence[Difference], near: list[_Near], lacking: tuple[str, ...]
    ) -> Iterator[tuple[Reason, list[_Near]]]:
        """Reasons that name the nodes in which a layer differs, in the words of a pattern where it names them too."""
        remaining = list(near)
        open_kinds = dict.fromkeys([*(self._kind(one.miss.fusion, lacking) for one in near), *lacking])
        for place, difference in enumerate(differences):
            last = place == len(differences) - 1
            here = difference.here
            own = [one for one in remaining if last or self._concerns(one, difference)]
            remaining = [one for one in remaining if one not in own]
            kinds = [k for k in open_kinds if last or self._is_in(difference, k, other)]
            kinds += [k for one in own if (k := self._kind(one.miss.fusion, lacking)) not in kinds]
            open_kinds = {k: None for k in open_kinds if k not in kinds}
            missed = tuple(kinds)
            named = [one for one in own if _names(one, here)]
            if named:
                yield self._of_pattern(named[:1], missed, odd=True), own
                continue
            expected, found = self.layers.describe(difference)
            replaced = [c for c in self.explanation.constructs if c.layer == other and c.kind in missed]
            size = replaced[0].size if replaced else 0
            yield (
                Reason(
                    DIFFERENCE,
                    missed,
                    here.sources,
                    expected,
                    f"{found} at {here.sources[0]}",
                    own[0].miss.line if own else replaced[0].line if replaced else "",
                    own[0].miss.matched if own else max(0, size - 1),
                    own[0].miss.total if own else size,
                    (self.layers.home(here.sources),),
                    (layer,),
                    True,
                ),
                own,
            )

    def _concerns(self, near: _Near, difference: Difference) -> bool:
        return _names(near, difference.here) or bool({*near.place.sources} & {*difference.here.sources})

    def _is_in(self, difference: Difference, kind: str, other: Layer) -> bool:
        """Whether the other layer's counterpart of a different node is a part of such a construct."""
        there = difference.there
        return there is not None and any(
            {*there.sources} & {*c.sources}
            for c in self.explanation.constructs
            if c.layer == other and c.kind == kind
        )


def _names(near: _Near, step: Step) -> bool:
    """Whether a pattern's reason names a node."""
    words = {*near.place.at, *near.place.found.replace(",", " ").split()}
    return bool(words & {*step.sources})
