"""What it would take for a place to match: a node exchanged, put in or left out, or one that reads something else.

A search like the matcher's, which goes on where the graph and the pattern part, at most `OVERLOOKED` times. It is done for
the places only that are left when all is fused, and finds no matches but reasons.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fuser.graph import Node, Value
from fuser.matching import (
    OVERLOOKED,
    Failure,
    Goals,
    Matcher,
    OutOfSteps,
    describe,
    describe_node,
    is_like,
)
from fuser.pattern import Apply, Literal, Result


class Nearest(Matcher):
    """Finds how near a place is to one source."""

    budget = 5_000  # steps for one anchor

    def nearest(self, node: Node) -> Failure | None:
        """The least that is wrong where a match would have its anchor at `node`."""
        self._forget()
        try:
            found = self._search(node, overlook=OVERLOOKED)
        except OutOfSteps:
            found = None
        return self._best if found is None else None

    def _fail(
        self, rank: int, wanted: Apply, expected: str, found: str, place: Node | None, matched: int | None = None
    ) -> None:
        if matched is not None:  # what is in the way of one match may be passed over in another
            super()._fail(rank, wanted, expected, found, place, matched)

    @contextmanager
    def _overlooking(self, wanted: Apply | None, expected: str, found: str, place: Node | None) -> Iterator[bool]:
        """Notes that something is wrong, as long as that may be passed over; says whether it may."""
        may = wanted is not None and place is not None and len(self._wrong) < self._overlook
        if may and wanted is not None:
            self._wrong.append((wanted, expected, found, place))
        yield may
        if may:
            self._wrong.pop()

    def _misread(
        self, by: Apply | None, expected: str, value: Value | None, rest: Goals, wanted: Value | None = None
    ) -> Iterator[None]:
        """Goes on as if the node that reads `value` read what is expected, or the node put in between were not there."""
        reader = None if by is None else self._nodes.get(id(by))
        if reader is None:
            return
        found, place = f"{describe(value)}, read by {describe_node(reader)}", reader
        if value is not None and value.producer is not None and wanted is not None and wanted in value.producer.inputs:
            found, place = describe(value), value.producer
        with self._overlooking(by, expected, found, place) as may:
            if may:
                yield from self._solve(rest)

    def _edited(self, pattern: Result, value: Value | None, by: Apply | None, rest: Goals) -> Iterator[None]:
        """Goes on as if the node that makes `value` were another one, or were not there, or the one before it were."""
        wanted, node = pattern.node, value.producer if value is not None else None
        if node is not None and node not in self._nodes.values():
            with self._overlooking(wanted, str(wanted), describe_node(node), node) as may:
                if may and pattern.index == 0 and len(node.inputs) == len(wanted.inputs):
                    yield from self._bind(wanted, node, (wanted.inputs,), rest)
                for given in node.inputs if may else ():
                    if given is not None and given.producer is not None and is_like(given.producer, wanted):
                        yield from self._solve((pattern, given, by, rest))
        reader = None if by is None else self._nodes.get(id(by))
        with self._overlooking(by, str(by), describe_node(reader) if reader else "", reader) as may:
            for sub in wanted.inputs if may else ():
                if not isinstance(sub, Literal):
                    yield from self._solve((sub, value, by, rest))
        yield from self._misread(by, str(wanted), value, rest)

    def _turned(self, wanted: Apply, node: Node, rest: Goals) -> Iterator[None]:
        """Goes on as if two inputs were in the other order."""
        if len(wanted.inputs) == 2:
            with self._overlooking(wanted, str(wanted), describe_node(node), node) as may:
                if may:
                    yield from self._bind(wanted, node, (wanted.inputs[::-1],), rest)

    def _beside(self, wanted: Result, users: Iterable[Node]) -> list[Value]:
        """What reads the value all the same, and behind it what the pattern has."""
        found = [user.output for user in users]
        return found + [after.output for value in found for after in value.consumers if is_like(after, wanted.node)]
