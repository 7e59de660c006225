"""What was fused and what was not, layer by layer, and the reasons, the likeliest first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fuser.layers import Difference, Layer, Layers, Part, Step
from fuser.matching import STRUCTURE
from fuser.rewriting import Miss, Outcome, Place

VERSION = 1
DIFFERENCE = "difference"
KINDS = ("check", "escape", "structure", DIFFERENCE)  # of reasons, those of a pattern by rank
MAJORITY_OF = 3  # fewer layers are no measure of one another
DIFFERENCES = 3  # of one layer that are told


class Spot(NamedTuple):
    """Where to look: a layer (None: outside of any), a module and a node."""

    layer: Layer | None
    module: str
    node: str

    def to_json(self) -> dict[str, Any]:
        return {**layer_json(self.layer), "module": self.module, "node": self.node}


@dataclass(eq=False)
class Reason:
    """Why something is not fused: where the graph and a pattern part, or a layer and the other layers.

    Attributes:
        kind: `check`, `escape` or `structure`, by the pattern; `difference`, by the other layers.
        missed: the constructs that are not there for it; none where a layer is different and fused all the same.
        at: the source nodes of the node to look at, its name first.
        line: of the pattern; "" where none comes into it.
        spots: every place that is so; the rest is said of the first.
        odd: whether most layers are not so.
        others: where a pattern has the word, what the other layers have there, and this one.
        different: whether it names a node in which the layer differs from the others.
    """

    kind: str
    missed: tuple[str, ...]
    at: tuple[str, ...]
    expected: str
    found: str
    line: str
    matched: int
    total: int
    spots: tuple[Spot, ...]
    odd: bool = False
    others: str = ""
    different: bool = False

    def order(self, *, spread: bool) -> tuple[Any, ...]:
        """The smaller, the likelier to be what is wrong.

        What is odd in a layer built like the others has come from one that is not: where there is such a thing
        (`spread`), a difference comes before it, even one for which nothing is missed in its own layer.
        """
        if self.missed:
            place = 3 if not self.odd else 0 if self.different else 2
        else:
            place = 1 if spread else 4
        return (place, KINDS.index(self.kind), -self.matched / max(1, self.total))

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
            "places": [spot.to_json() for spot in self.spots],
            "odd": self.odd,
            "others": self.others,
            "different": self.different,
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
    place: Place | None = None  # of a miss that a pattern has the word for
    error: float | None = None  # of one that was fused, as its check found it

    def to_json(self) -> dict[str, Any]:
        found = {
            "kind": self.kind,
            "status": "fused" if self.reason is None else "missed",
            **layer_json(self.layer),
            "module": self.module,
            "nodes": list(self.sources),
            "pattern": self.line,
        }
        if self.reason is not None:
            by = self.reason if self.place is None else self.place
            found |= {"matched": self.reason.matched, "total": self.reason.total, "reason": self.reason.kind}
            found |= {"node": by.at[0], "expected": by.expected, "found": by.found}
        return found


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
                    group = alike.setdefault(self._contents(layer, constructs), Group([], constructs))
                    group.layers.append(layer)
            most = max(alike.values(), key=lambda group: len(group.layers))
            for group in alike.values():
                group.usual = most if group is not most and len(most.layers) > 1 else None
            found += sorted(alike.values(), key=lambda group: group is not most)
        return found

    def differing(self, layer: Layer) -> list[Reason]:
        """What is different in a layer, though nothing is missed for it."""
        return [reason for reason in self.reasons if not reason.missed and layer in (s.layer for s in reason.spots)]

    def _contents(self, layer: Layer, constructs: Sequence[Construct]) -> frozenset[Any]:
        counts = Counter((c.kind, self.layers.within(c.module), id(c.reason)) for c in constructs)
        return frozenset([*counts.items(), *map(id, self.differing(layer))])

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
                construct.to_json() | ({"rank": ranks[id(construct.reason)]} if construct.reason is not None else {})
                for construct in self.constructs
            ],
            "reasons": [{"rank": ranks[id(reason)], **reason.to_json()} for reason in self.reasons],
        }


def layer_json(layer: Layer | None) -> dict[str, Any]:
    """The stack and number of a layer; None outside of any."""
    return {"stack": None if layer is None else layer.stack, "layer": None if layer is None else layer.index}


def layer_of(place: Place, layers: Layers) -> Layer | None:
    """The layer of a near miss: that of the node to look at, for much of what matched may be shared by all layers."""
    return layers.of(place.at) or layers.of(place.sources)


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
            Construct(
                fused.kind, layer, module, fused.sources, layers.size(fused.sources), fused.line, error=fused.error
            )
        )
    _Reasoning(made, outcome).find()
    made.constructs.sort(key=lambda construct: layers.depth(construct.sources))
    return made


class _Reasoning:
    """Finds the reasons of an explanation whose fused constructs are there."""

    def __init__(self, explanation: Explanation, outcome: Outcome) -> None:
        self.explanation, self.layers = explanation, explanation.layers
        self.near = [
            _Near(miss, place, layer_of(place, self.layers)) for miss in outcome.misses for place in miss.places
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
        for one in self.near:
            if id(one) not in told:
                alike.setdefault(id(one.miss), []).append(one)
        self.found += [(self._of_pattern(near), near) for near in alike.values()]
        spread = any(reason.missed and reason.odd and not reason.different for reason, _ in self.found)
        self.found.sort(key=lambda pair: pair[0].order(spread=spread))
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
            tuple(Spot(one.layer, self._module(one.place), one.place.node) for one in near),
            odd,
        )

    def _kind(self, operator: str, among: Sequence[str] = ()) -> str:
        """What a missed operator would have been counted as: what is lacking, if that is clear."""
        lacking = [kind for kind in self.kinds.get(operator, ()) if kind in among]
        return lacking[0] if len(lacking) == 1 else operator

    def _module(self, place: Place) -> str:
        """The module of what had matched, what layers share left aside."""
        layer = layer_of(place, self.layers)
        own = [source for source in place.sources if self.layers.of((source,)) == layer]
        return self.layers.home(own or place.at) or place.module

    def _missed(self, reason: Reason, near: Sequence[_Near]) -> Iterator[Construct]:
        """The constructs that are missed for a reason, each at its place."""
        for one in near:
            kind, sources = self._kind(one.miss.fusion, reason.missed), one.place.sources
            size = self.layers.size(sources)
            place = None if reason.kind == DIFFERENCE else one.place
            yield Construct(kind, one.layer, self._module(one.place), sources, size, one.miss.line, reason, place)
        told = {self._kind(one.miss.fusion, reason.missed) for one in near}
        for kind in reason.missed:
            if kind not in told:
                layer, module, _ = reason.spots[0]
                yield Construct(kind, layer, module, reason.at, self.layers.size(reason.at), reason.line, reason)

    # One layer among others.

    def _odd_ones(self, members: Sequence[Layer]) -> Iterator[tuple[Reason, list[_Near]]]:
        """The reasons in layers that are not like most layers of their stack."""
        usual = self._usual(members)
        if len(members) < MAJORITY_OF or not usual:
            return
        inner = [
            layer for layer in usual if layer in members[1:-1]
        ]  # the first and the last read and give other things
        alike = self.layers.usual(inner if len(inner) >= MAJORITY_OF - 1 else usual)
        unique = {layers[0] for layers in self.layers.alike(members[1:-1]) if len(layers) == 1}
        everywhere = {id(near.miss) for near in self.near if near.layer in usual}
        for layer in members:
            own = [near for near in self.near if near.layer == layer and id(near.miss) not in everywhere]
            lacking = tuple(dict.fromkeys((self._fused(usual[0]) - self._fused(layer)).elements()))
            if alike and layer not in alike:
                other = min(alike, key=lambda other: abs(other.index - layer.index))
                if layer in (members[0], members[-1]) and not self.layers.named and not own:
                    continue  # where the first layer begins and the last one ends is not that certain
                yield from self._by_difference(layer, other, own, lacking, unique=layer in unique)
            else:
                yield from self._by_pattern(own, lacking)

    def _by_pattern(self, own: Sequence[_Near], lacking: tuple[str, ...]) -> Iterator[tuple[Reason, list[_Near]]]:
        """What patterns say of the near misses that one layer alone has."""
        for miss in {id(near.miss): near.miss for near in own}.values():
            near = [one for one in own if one.miss is miss]
            yield self._of_pattern(near, (self._kind(miss.fusion, lacking),), odd=True), near

    def _usual(self, members: Sequence[Layer]) -> list[Layer]:
        """The layers with the contents that most have, the first and the last aside where there are enough."""
        contents: dict[Any, list[Layer]] = {}
        for layer in members:
            fused = Counter(
                (c.kind, self.layers.within(c.module), c.size) for c in self.explanation.constructs if c.layer == layer
            )
            missed = Counter(id(near.miss) for near in self.near if near.layer == layer)
            contents.setdefault(frozenset([*fused.items(), *missed.items()]), []).append(layer)
        inner = members[1:-1] if len(members) >= MAJORITY_OF + 2 else members
        most = max(contents.values(), key=lambda layers: len({*layers} & {*inner}))
        return most if 2 * len({*most} & {*inner}) > len(inner) else []

    def _fused(self, layer: Layer) -> Counter[str]:
        return Counter(c.kind for c in self.explanation.constructs if c.layer == layer and c.reason is None)

    def _by_difference(
        self, layer: Layer, other: Layer, own: list[_Near], lacking: tuple[str, ...], *, unique: bool
    ) -> Iterator[tuple[Reason, list[_Near]]]:
        """Reasons that name the nodes in which a layer differs, in the words of a pattern where it names them too.

        A difference for which nothing is missed counts in a layer that is the only one of its kind, neither the first nor
        the last, which have reasons of their own.
        """
        found: list[tuple[Difference, list[str], list[_Near]]] = []
        for difference in self.layers.differences(layer, other):
            inside = [kind for kind in lacking if self._is_in(difference, kind, other)]
            near = [
                one for one in own if self._concerns(one, difference) or self._kind(one.miss.fusion, lacking) in inside
            ]
            own = [one for one in own if one not in near]
            kinds = list(dict.fromkeys([*(self._kind(one.miss.fusion, lacking) for one in near), *inside]))
            lacking = tuple(kind for kind in lacking if kind not in kinds)
            if kinds or unique:
                found.append((difference, kinds, near))
        yield from self._by_pattern(own, lacking)
        for difference, kinds, near in sorted(found, key=lambda one: not one[1])[:DIFFERENCES]:
            missed = tuple(dict.fromkeys([*kinds, *lacking])) if kinds else ()
            lacking = () if kinds else lacking  # the others are not there because these are not
            named = [one for one in near if _names(one, difference.here)]
            if named:
                reason = self._of_pattern(named[:1], missed, odd=True)
                reason.different = True
                if named[0].miss.rank == STRUCTURE:
                    reason.others = "   here ".join(self.layers.describe(difference))
                yield reason, near
            else:
                yield self._of_layers(layer, other, difference, missed, near), near

    def _of_layers(
        self, layer: Layer, other: Layer, difference: Difference, missed: tuple[str, ...], near: Sequence[_Near]
    ) -> Reason:
        """What a layer has where another one has something else."""
        here = difference.here
        expected, found = self.layers.describe(difference)
        replaced = [c for kind in missed for c in self.explanation.constructs if c.layer == other and c.kind == kind]
        if near:
            line, matched, total = near[0].miss.line, near[0].miss.matched, near[0].miss.total
        elif replaced:
            line, matched, total = replaced[0].line, replaced[0].size - 1, replaced[0].size
        else:
            line, matched, total = "", 0, 0
        return Reason(
            DIFFERENCE, missed, here.sources, expected, f"{found} at {here.sources[0]}", line, matched, total,
            (Spot(layer, self.layers.home(here.sources), here.sources[0]),), True, different=True,
        )  # fmt: skip

    def _concerns(self, near: _Near, difference: Difference) -> bool:
        return _names(near, difference.here) or bool({*near.place.sources} & self.layers.around(difference.here))

    def _is_in(self, difference: Difference, kind: str, other: Layer) -> bool:
        """Whether the other layer's counterpart of a different node is a part of such a construct."""
        around = self.layers.around(difference.there) if difference.there is not None else set()
        return any(around & {*c.sources} for c in self.explanation.constructs if c.layer == other and c.kind == kind)


def _names(near: _Near, step: Step) -> bool:
    """Whether a pattern's reason names a node."""
    words = {*near.place.at, *near.place.found.replace(",", " ").split()}
    return bool(words & {*step.sources})
