"""A diff as text: unified, a hunk for each run of layers that are alike, modules as indentation."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from fuser.diff.document import Document, Item, Region

WIDTH = 100
DEEPEST = 10  # columns that modules are indented by at most
OPERATORS = 24  # of one place that are told one by one
MOST_COMMON = 8  # operators of more
COLOURS = {"-": "31", "+": "32", "@": "36", "!": "33"}


def text(document: Document, *, colour: bool = False) -> str:
    """The diff for people, lines of at most 100 characters where no name is longer; with ANSI colours if asked for.

    Lines begin with `-` for source operators, `+` for what stands for them, `!` for how that is known; the rest is in both.
    """
    lines = [document.title, "", *_summary(document), "", *_Hunks(document).lines()]
    if not colour:
        return "\n".join(lines)
    return "\n".join(f"\033[{COLOURS[line[0]]}m{line}\033[0m" if line[:1] in COLOURS else line for line in lines)


def _summary(document: Document) -> Iterator[str]:
    widths = [max(len(part) for part in column) for column in zip(*(row[:3] for row in document.summary), strict=True)]
    for row in document.summary:
        arrow = "->" if row.before else "  "
        line = f"  {row.label:<{widths[0]}}  {row.before:>{widths[1]}} {arrow} {row.after:<{widths[2]}}"
        yield f"{line}  {row.note}".rstrip()


class _Entry(NamedTuple):
    """What is told at one place: a node of the result with what it stands for, or source nodes that are gone.

    A node that is in both has no lines: those that follow one another are told together.
    """

    order: float
    module: tuple[str, ...]
    lines: list[str]
    same: Item | None = None


class _Hunks:
    """The hunks of a document, in the order of the graph: what is outside of layers, then the runs of layers."""

    def __init__(self, document: Document) -> None:
        self.document, self.before, self.after = document, document.before, document.after
        self.region_of = {number: region for region in document.regions for number in region.after}
        self.sources: dict[int, list[int]] = defaultdict(list)
        for change in document.kept():
            self.sources[change.after].append(change.before)
        self.texts = {change.after: change.text for change in document.changed}
        kept = {number for region in document.regions for number in region.before}
        kept |= {number for found in self.sources.values() for number in found}
        self.gone: dict[int, list[int]] = defaultdict(list)
        for number, item in enumerate(self.before.nodes):
            if number not in kept:
                self.gone[item.layer].append(number)

    def lines(self) -> Iterator[str]:
        outside = [number for number, item in enumerate(self.after.nodes) if item.layer < 0]
        yield from self._hunk("outside the layers" if self.after.folds else "all nodes", -1, outside)
        for fold in self.after.folds:
            times = f" (x {len(fold.layers)})" if len(fold.layers) > 1 else ""
            yield from self._hunk(fold.label + times, fold.layers[0], sorted(self.after.members[fold.layers[0]]))
        if self.document.misses:
            yield from self._misses()

    def _hunk(self, heading: str, layer: int, members: Sequence[int]) -> Iterator[str]:
        inside = self.after.layers[layer][0].split(".") if layer >= 0 else []
        entries = [*self._kept(members, inside), *self._removed(layer, inside)]
        if not entries:
            return
        if all(entry.same is not None for entry in entries):
            yield f"@@ {heading}: {len(entries)} operator{'s' if len(entries) > 1 else ''}, the same @@"
            return
        yield f"@@ {heading} @@"
        shown: tuple[str, ...] = ()
        entries.sort(key=lambda entry: entry.order)
        for (path, _), group in groupby(entries, key=lambda entry: (entry.module, entry.same is None)):
            for depth, name in enumerate(path):
                if path[: depth + 1] != shown[: depth + 1]:
                    yield f"  {_indent(depth)}{name}"
            shown = path
            told = list(group)
            lines = [line for entry in told for line in entry.lines]
            lines += _filled(" ", _operators(entry.same for entry in told if entry.same is not None))
            yield from (f"{line[:1]} {_indent(len(path))}{line[2:]}".rstrip() for line in lines)

    def _kept(self, members: Sequence[int], inside: Sequence[str]) -> Iterator[_Entry]:
        """The nodes of the result, each where the last of its source nodes stands."""
        told: set[int] = set()
        place = -1.0
        for number in members:
            region = self.region_of.get(number)
            if region is not None and id(region) in told:
                continue
            sources = region.before if region is not None else self.sources[number]
            place = max([place, *map(float, sources[-1:])])
            path = self._path(self.after.nodes[number], inside)
            if region is not None:
                told.add(id(region))
                yield _Entry(place, path, list(self._region(region)))
            elif sources and number not in self.texts:
                yield _Entry(place, path, [], self.after.nodes[number])
            else:
                yield _Entry(place, path, list(self._other(number)))

    def _removed(self, layer: int, inside: Sequence[str]) -> Iterator[_Entry]:
        """The source nodes that nothing stands for, those of one module together."""
        modules: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number in self.gone[layer]:
            modules[self._path(self.before.nodes[number], inside)].append(number)
        for path, numbers in modules.items():
            operators = _operators(self.before.nodes[number] for number in numbers)
            yield _Entry(numbers[0] - 0.5, path, list(_filled("-", [*operators, "(removed)"])))

    def _path(self, item: Item, inside: Sequence[str]) -> tuple[str, ...]:
        """A node's module within a layer; outside of layers all of it."""
        name = self.document.modules[item.module]
        path = name.split(".") if name else []
        return tuple(path[len(inside) :]) if path[: len(inside)] == list(inside) else ()

    def _other(self, number: int) -> Iterator[str]:
        """A node that is changed, or is of the result alone."""
        yield from (f"- {self.before.nodes[source].op}" for source in self.sources[number])
        yield f"+ {self.after.nodes[number].op}   {self.texts.get(number, '')}".rstrip()

    def _region(self, region: Region) -> Iterator[str]:
        yield from _filled("-", _operators(self.before.nodes[number] for number in region.before))
        pattern = self.document.patterns[region.pattern]
        items = [self.after.nodes[number] for number in region.after]
        named = any(item.label == pattern.name for item in items)
        yield from _filled("+", [*(item.op for item in items), *([] if named else [f"({pattern.name})"])])
        reason = ""
        for part in (pattern.line, region.note, f"saves {region.saved}" if region.saved else ""):
            if reason and len(reason) + len(part) > WIDTH - DEEPEST - 5:
                yield f"! {reason}"
                reason = ""
            reason += f"   {part}" if reason and part else part
        if reason:
            yield f"! {reason}"

    def _misses(self) -> Iterator[str]:
        yield "@@ near misses @@"
        for miss in self.document.misses:
            item = self.before.nodes[miss.before]
            where = [self.document.patterns[miss.pattern].name, miss.line, self.document.modules[item.module]]
            more = f"and {len(miss.also)} more like it" if miss.also else ""
            yield "! " + "   ".join(filter(None, [*where, more]))
            yield from _filled(" ", ["  expected ", miss.expected])
            yield from _filled(" ", ["  found    ", f"{miss.found}  (node {item.name})"])


def _indent(depth: int) -> str:
    return " " * min(DEEPEST, 2 * depth)


def _operators(items: Iterable[Item]) -> list[str]:
    """Operators one by one, or how often each comes."""
    names = [item.op for item in items]
    if len(names) > OPERATORS:
        common = Counter(names).most_common(MOST_COMMON)
        rest = len(names) - sum(count for _, count in common)
        return [f"{name} x {count}" for name, count in common] + ([f"and {rest} more"] if rest else [])
    runs = ((name, len(list(group))) for name, group in groupby(names))
    return [name if count == 1 else f"{name} x {count}" for name, count in runs]


def _filled(sign: str, words: Iterable[str]) -> list[str]:
    """Words behind a sign, wrapped."""
    lines = textwrap.wrap(" ".join(words), WIDTH - DEEPEST - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{sign} {line}" for line in lines]
