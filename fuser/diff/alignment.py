"""Which nodes of one graph are which of another: by the record of what was rewritten, and where there is none by comparison.

Without a record, nodes are found by what they compute, by what becomes of it, by their names and weights, and at last as
the neighbours of nodes that were found; what is left between the same neighbours on both sides is taken to be replaced.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fuser.constants import Constant
from fuser.diff.document import Changed
from fuser.diff.structure import WEIGHT, Structure, constant_text, input_labels
from fuser.graph import FUSER, MICROSOFT, Node
from fuser.pattern import COMMUTATIVE

SOURCES = "fuser.sources"  # metadata of the files that fuser writes
COMMAS = 8  # in the name of a node that the metadata's list can hold
REWRITTEN = "rewritten"
REPLACED = "replaced"
RADII = (3, 2, 1)  # links around a node that tell it from others


class Stands(NamedTuple):
    """Nodes of the result that stand for source nodes, by what was made of them, and how that is known."""

    kind: str
    after: tuple[int, ...]
    before: tuple[int, ...]
    line: str = ""
    error: float | None = None
    recorded: bool = True


@dataclass
class Alignment:
    """What of one graph is what of another."""

    regions: list[Stands] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)

    def kept(self) -> Iterator[Changed]:
        """Nodes outside regions that have a counterpart, those that are the same among them."""
        yield from (Changed(source, number) for source, number in self.pairs)
        yield from self.changed


class Record(NamedTuple):
    """What a rewrite recorded of a fused node."""

    kind: str
    line: str
    error: float | None


def recorded(
    before: Structure, after: Structure, sources: Mapping[str, int], records: Callable[[Node], Record | None]
) -> Alignment:
    """The alignment of a graph and what was made of it in this process.

    Args:
        sources: the nodes of the graph as it was read, by the name that origins call them.
        records: of a node that is fused what was recorded.
    """
    found = Alignment()
    taken: set[int] = set()
    rewritten: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, node in enumerate(after.nodes):
        stands_for = _numbers(node.origin.sources, sources)
        record = records(node)
        if record is not None:
            found.regions.append(Stands(record.kind, (number,), stands_for, record.line, record.error))
        elif len(stands_for) > 1:
            rewritten[stands_for].append(number)
        elif stands_for:
            (source,) = stands_for
            text = _difference(before, after, source, number)
            if text or source in taken:
                found.changed.append(Changed(source, number, text))
            else:
                found.pairs.append((source, number))
            taken.add(source)
    fused = {region.before: place for place, region in enumerate(found.regions)}
    for stands_for, numbers in rewritten.items():
        if stands_for in fused:  # what is beside a fused node is of its region
            region = found.regions[fused[stands_for]]
            found.regions[fused[stands_for]] = region._replace(after=(*region.after, *numbers))
        else:
            found.regions.append(Stands(REWRITTEN, tuple(numbers), stands_for))
    return found


def _numbers(names: Iterable[str], sources: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sorted({sources[name] for name in names if name in sources}))


def compared(before: Structure, after: Structure) -> Alignment:
    """The alignment of any two graphs; the metadata of a file that fuser wrote is taken for its record."""
    found = _from_metadata(before, after)
    used = {n for region in found.regions for n in region.before}, {n for region in found.regions for n in region.after}
    matching = _Matching(before, after, *used)
    matching.run()
    for source, number in sorted(matching.of_before.items()):
        text = _difference(before, after, source, number, matching.of_before)
        if text:
            found.changed.append(Changed(source, number, text))
        else:
            found.pairs.append((source, number))
    for region in _replaced(matching):
        if len(region.before) == len(region.after) == 1:
            text = _difference(before, after, region.before[0], region.after[0])
            found.changed.append(Changed(region.before[0], region.after[0], text))
        else:
            found.regions.append(region)
    return found


def _from_metadata(before: Structure, after: Structure) -> Alignment:
    """What a file that fuser wrote says of its nodes' sources, where all of them are nodes of the other file."""
    names = {source: number for number, node in enumerate(before.nodes) for source in node.origin.sources}
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, node in enumerate(after.nodes):
        said = next((text for key, text in node.metadata if key == SOURCES), "")
        stands_for = _known(said.split(", "), names) if said else None
        is_made = (
            node.domain in (FUSER, MICROSOFT)
            and stands_for
            and before.operators[stands_for[0]] != after.operators[number]
        )
        if stands_for and (len(stands_for) > 1 or is_made):
            groups[stands_for].append(number)
    within = defaultdict[int, list[tuple[int, ...]]](list)
    for stands_for in groups:
        for number in stands_for:
            within[number].append(stands_for)
    for stands_for in sorted(groups, key=len):  # what helps a fused node stands for a part of what that stands for
        whole = [other for other in within[stands_for[0]] if other in groups and set(other) > set(stands_for)]
        if whole:
            groups[min(whole, key=len)] += groups.pop(stands_for)
    found = Alignment()
    for stands_for, numbers in groups.items():
        numbers.sort()
        own = [n for n in numbers if after.nodes[n].domain] or numbers[-1:]
        found.regions.append(Stands(after.nodes[own[0]].op, tuple(numbers), stands_for))
    return found


def _known(words: Sequence[str], names: Mapping[str, int]) -> tuple[int, ...] | None:
    """The nodes that a list names, some names with the list's own comma in them; None where one is no node."""
    found: set[int] = set()
    name: list[str] = []
    for word in words:
        name.append(word)
        joined = ", ".join(name)
        if joined in names:
            found.add(names[joined])
            name = []
        elif len(name) > COMMAS:
            return None
    return None if name else tuple(sorted(found))


class _Matching:
    """Pairs nodes of two graphs that no record speaks of."""

    def __init__(self, before: Structure, after: Structure, used_before: set[int], used_after: set[int]) -> None:
        self.before, self.after = before, after
        self.used_before, self.used_after = used_before, used_after
        self.of_before: dict[int, int] = {}
        self.of_after: dict[int, int] = {}

    def run(self) -> None:
        labels = input_labels(self.before.graph, self.after.graph)
        forward = self.before.forward(labels[0]), self.after.forward(labels[1])
        backward = self.before.backward(), self.after.backward()
        self._by_keys(*([*zip(f, b, strict=True)] for f, b in zip(forward, backward, strict=True)))
        self._by_keys(*forward)
        self._by_keys(*backward)
        self._by_names(self._names)
        self._by_names(self._weights)
        self._by_keys(self.before.weighty, self.after.weighty)
        self._by_neighbours()
        for radius in RADII:
            if not all(self.left()):
                break
            self._by_keys(self.before.around(radius), self.after.around(radius))
            self._by_neighbours()

    def _free(self, structure: Structure) -> Iterator[int]:
        taken, used = (
            (self.of_before, self.used_before) if structure is self.before else (self.of_after, self.used_after)
        )
        return (number for number in range(len(structure.nodes)) if number not in taken and number not in used)

    def _pair(self, source: int, number: int) -> None:
        self.of_before[source], self.of_after[number] = number, source

    def _by_keys(self, before: Sequence[Hashable], after: Sequence[Hashable]) -> None:
        """Pairs nodes with a key that as many nodes of either side have, in order; None is no key."""
        groups: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for number in self._free(self.before):
            groups[before[number]][0].append(number)
        for number in self._free(self.after):
            groups[after[number]][1].append(number)
        for key, (here, there) in groups.items():
            if key is not None and len(here) == len(there):
                for source, number in zip(here, there, strict=True):
                    self._pair(source, number)

    def _by_names(self, names: Callable[[Structure, int], Hashable]) -> None:
        """Pairs nodes of one operator with the same name, unless more of their neighbours say otherwise than say so."""
        there: dict[Hashable, list[int]] = defaultdict(list)
        for number in self._free(self.after):
            there[names(self.after, number)].append(number)
        here = Counter(names(self.before, number) for number in self._free(self.before))
        for source in list(self._free(self.before)):
            name = names(self.before, source)
            if name is not None and here[name] == 1 and len(there[name]) == 1:
                (number,) = there[name]
                if self._support(source, number) >= 0:
                    self._pair(source, number)

    def _names(self, structure: Structure, number: int) -> Hashable:
        node = structure.nodes[number]
        names = (node.name, next((value.name for value in node.outputs if value.name), ""))
        return (structure.operators[number], *names) if any(names) else None

    def _weights(self, structure: Structure, number: int) -> Hashable:
        """The names of the weights that a node reads."""
        names = tuple(
            value.name if value is not None and value.constant is not None else ""
            for value in structure.nodes[number].inputs
            if value is None or value.constant is None or value.constant.size > WEIGHT
        )
        return (structure.operators[number], names) if any(names) else None

    def _support(self, source: int, number: int) -> int:
        """How many neighbours are paired with each other, less those that are paired with others."""
        makers = zip(self.before.nodes[source].inputs, self.after.nodes[number].inputs, strict=False)
        votes = [(self.before.maker(a), self.after.maker(b)) for a, b in makers]
        found = 0
        for a, b in votes:
            if a in self.of_before:
                found += 1 if self.of_before[a] == b else -1
        readers = {reader for _, reader, _ in self.after.readers(number)}
        for _, reader, _ in self.before.readers(source):
            if reader in self.of_before:
                found += 1 if self.of_before[reader] in readers else -1
        return found

    def _by_neighbours(self) -> None:
        """Pairs what alone of its operator stands in the same place beside nodes that are paired."""
        pending = list(self.of_before.items())
        while pending:
            source, number = pending.pop()
            for pair in [*self._makers(source, number), *self._readers(source, number)]:
                if pair[0] not in self.of_before and pair[1] not in self.of_after:
                    self._pair(*pair)
                    pending.append(pair)

    def _makers(self, source: int, number: int) -> Iterator[tuple[int, int]]:
        commute = self.before.operators[source] in COMMUTATIVE

        def keyed(structure: Structure, at: int) -> Iterator[tuple[Hashable, int]]:
            for place, value in enumerate(structure.nodes[at].inputs):
                maker = structure.maker(value)
                if maker is not None and value is not None:
                    yield (structure.operators[maker], value.index, 0 if commute else place), maker

        return self._unique(keyed(self.before, source), keyed(self.after, number))

    def _readers(self, source: int, number: int) -> Iterator[tuple[int, int]]:
        def keyed(structure: Structure, at: int) -> Iterator[tuple[Hashable, int]]:
            for index, reader, place in structure.readers(at):
                op = structure.operators[reader]
                yield (op, index, 0 if op in COMMUTATIVE else place), reader

        return self._unique(keyed(self.before, source), keyed(self.after, number))

    def _unique(
        self, before: Iterator[tuple[Hashable, int]], after: Iterator[tuple[Hashable, int]]
    ) -> Iterator[tuple[int, int]]:
        """Pairs of free nodes whose key no other free node of their side has."""
        groups: dict[Hashable, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
        for key, number in before:
            if number not in self.of_before and number not in self.used_before:
                groups[key][0].add(number)
        for key, number in after:
            if number not in self.of_after and number not in self.used_after:
                groups[key][1].add(number)
        for here, there in groups.values():
            if len(here) == len(there) == 1:
                yield next(iter(here)), next(iter(there))

    def left(self) -> tuple[list[int], list[int]]:
        """The nodes of either side that have no counterpart."""
        return list(self._free(self.before)), list(self._free(self.after))


def _replaced(matching: _Matching) -> list[Stands]:
    """Connected nodes without a counterpart, of either side, that are read by the same node in the same place, or give
    what has the same name."""
    before, after = matching.before, matching.after
    left, right = matching.left()
    part_of = {**_components(before, left, 0), **_components(after, right, 1)}
    joined: dict[tuple[int, int], tuple[int, int]] = {part: part for part in part_of.values()}

    def root(part: tuple[int, int]) -> tuple[int, int]:
        while joined[part] != part:
            joined[part] = part = joined[joined[part]]
        return part

    names = {value.name: n for n in left for value in before.nodes[n].outputs if value.name}
    for number in right:
        node = after.nodes[number]
        links = [names[value.name] for value in node.outputs if value.name in names]
        for index, reader, place in after.readers(number):
            twin = matching.of_after.get(reader)
            given = before.nodes[twin].input(place) if twin is not None else None
            maker = before.maker(given)
            if maker is not None and given is not None and given.index == index and (0, maker) in part_of:
                links.append(maker)
        for link in links:
            joined[root(part_of[1, number])] = root(part_of[0, link])
    groups: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for (side, number), part in part_of.items():
        groups[root(part)][side].append(number)
    found = []
    for here, there in groups.values():
        if here and there:
            named = [n for n in there if after.nodes[n].domain] or there[-1:]
            found.append(
                Stands(REPLACED if len(there) > 1 else after.nodes[named[0]].op, tuple(there), tuple(here), recorded=False)
            )  # fmt: skip
    return found


def _components(structure: Structure, numbers: Sequence[int], side: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(side, node) -> (side, first node) of the connected part that it is in."""
    among, found = set(numbers), dict[tuple[int, int], tuple[int, int]]()
    for first in numbers:
        pending = [first] if (side, first) not in found else []
        while pending:
            number = pending.pop()
            if number not in among or (side, number) in found:
                continue
            found[side, number] = (side, first)
            pending += [reader for _, reader, _ in structure.readers(number)]
            makers = (structure.maker(value) for value in structure.nodes[number].inputs)
            pending += [maker for maker in makers if maker is not None]
    return found


def _difference(
    before: Structure, after: Structure, source: int, number: int, pairs: Mapping[int, int] | None = None
) -> str:
    """What two nodes in the same place differ in; "" where that is nothing. What they read, where pairs are given."""
    a, b = before.nodes[source], after.nodes[number]
    if before.operators[source] != after.operators[number]:
        return f"{before.operators[source]} -> {after.operators[number]}"
    old, new = before.meant[source], after.meant[number]
    found = [
        f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if len(a.inputs) != len(b.inputs):
        found.append(f"{len(a.inputs)} -> {len(b.inputs)} inputs")
    elif pairs is not None:
        found += _inputs_difference(before, after, a, b, pairs)
        if not found and before.own[source] != after.own[number]:
            found.append("other contents")  # of a body of control flow, of a tensor among the attributes
    return "; ".join(found)


def _inputs_difference(
    before: Structure, after: Structure, a: Node, b: Node, pairs: Mapping[int, int]
) -> Iterator[str]:
    given = [*zip(a.inputs, b.inputs, strict=True)]
    if a.op in COMMUTATIVE and before.own[before.number[a]] == after.own[after.number[b]]:
        makers = [pairs.get(m) for x in a.inputs if (m := before.maker(x)) is not None]
        wanted = [m for y in b.inputs if (m := after.maker(y)) is not None]
        if Counter(makers) == Counter(wanted):
            return
    for place, (x, y) in enumerate(given):
        one, other = (None if value is None else value.constant for value in (x, y))
        if one is not None and other is not None:
            if before.table.digest(one) != before.table.digest(other):
                yield f"input {place}: {_constants_difference(one, other)}"
            continue
        maker, twin = before.maker(x), after.maker(y)
        if maker is not None and twin is not None and pairs.get(maker, twin) != twin:
            yield f"input {place}: another {after.operators[twin]}"
        elif (maker is None) != (twin is None) or (x is None) != (y is None):
            yield f"input {place}: {_what(before, x, maker)} -> {_what(after, y, twin)}"


def _what(structure: Structure, value: object, maker: int | None) -> str:
    constant = getattr(value, "constant", None)
    if maker is not None:
        return structure.operators[maker]
    return "none" if value is None else "a constant" if constant is not None else "an input"


def _constants_difference(one: Constant, other: Constant) -> str:
    old, new = constant_text(one), constant_text(other)
    return f"{old} -> {new}" if old != new else f"other elements in {new}"
