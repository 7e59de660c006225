"""Finding a source pattern in a graph, by backtracking, and remembering how close each failure came.

A match starts at the pattern's rarest operator, follows inputs backwards, and reaches the other outputs by climbing from
what is already bound to its readers. The engine, not the pattern, sees to it that no interior value escapes and that the
region is convex. Where there is no match, a second search that overlooks a wrong attribute or number finds out how near
the place was, and what is wrong there; `fuser.nearness` overlooks a wrong node as well.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from operator import attrgetter
from typing import Any

import onnx

from fuser import operators
from fuser.dims import text
from fuser.fused import Source, children
from fuser.graph import Graph, Node, Value, reaches, readers
from fuser.pattern import (
    COMMUTATIVE,
    Absent,
    Apply,
    Capture,
    CheckFailed,
    Either,
    Literal,
    Match,
    NotThis,
    Pattern,
    Result,
    Var,
    require,
)

STEP_BUDGET = 20_000  # for one anchor; an ordinary match takes a few dozen
OVERLOOKED = 2  # wrong attributes and numbers that the search for a reason passes over
CHECK, ESCAPE, STRUCTURE = range(3)  # how a candidate failed, the nearest to a match first


@dataclass(frozen=True)
class Failure:
    """Why one candidate is no match."""

    rank: int
    matched: int
    total: int
    line: str
    expected: str
    found: str
    place: Node | None
    nodes: frozenset[Node] = frozenset()  # what had matched

    @property
    def closeness(self) -> tuple[int, float, int]:
        """Greater is nearer; of two equally near ones the one that saw more of the graph knows better."""
        return (-self.rank, self.matched / max(1, self.total), len(self.nodes))


@cache
def _default(op: str, domain: str, name: str) -> Any:
    """The default ONNX, or ONNX Runtime for what it contributes, gives an attribute that is not there."""
    try:
        attribute = onnx.defs.get_schema(op, domain=domain).attributes.get(name)
    except onnx.defs.SchemaError:
        return operators.default(op, domain, name)
    if attribute is None or not attribute.default_value.name:
        return None
    found = onnx.helper.get_attribute_value(attribute.default_value)
    return found.decode() if isinstance(found, bytes) else found


def attribute(node: Node, name: str) -> Any:
    """An attribute's value, or ONNX's default for it."""
    if name in node.attributes:
        return node.attributes[name]
    return _default(node.op, node.domain, name)


def is_like(node: Node, wanted: Apply) -> bool:
    """Whether a node has the operator and, where the pattern names several, the outputs of a pattern's node."""
    return node.is_a(wanted.op, wanted.domain) and wanted.outputs in (1, len(node.outputs))


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, float) or isinstance(found, float):
        return found is not None and abs(wanted - found) <= 1e-6 * max(abs(wanted), 1e-30)
    return bool(wanted == found)


def describe(value: Value | None) -> str:
    """What stands at a place, for people: `Concat(a, b) at node_cat_7`."""
    if value is None:
        return "no input"
    if value.constant is not None:
        number = value.scalar
        return f"constant {value.name}{text(value.shape)}" if number is None else f"constant {number:g} ({value.name})"
    if value.producer is None:
        return f"input {value.name}"
    return describe_node(value.producer)


def describe_node(node: Node) -> str:
    inputs = ", ".join((v.producer.op if v.producer else v.name) if v else "-" for v in node.inputs)
    return f"{node.op}({inputs}) at {name_of(node)}"


def name_of(node: Node) -> str:
    return node.origin.sources[0] if node.origin.sources else node.name


class OutOfSteps(Exception):
    pass


_UNBOUND: Any = object()
Goals = tuple[Pattern | None, Value | None, Apply | None, Any] | None  # with the pattern's node that reads the value
Wrong = tuple[Apply, str, str, Node | None]


class Matcher:
    """Matches one source against one graph."""

    budget = STEP_BUDGET

    def __init__(
        self, graph: Graph, source: Source, counts: Mapping[tuple[str, str], int], anchor: Apply | None = None
    ) -> None:
        self.graph, self.source = graph, source
        self.anchor = anchor or anchors(source, counts)[0]
        self.total = source.size
        self.failures: dict[Node, Failure] = {}

    def candidates(self) -> list[Node]:
        """The graph's nodes at which a match may be anchored."""
        return [node for node in self.graph.nodes if is_like(node, self.anchor)]

    def match(self, node: Node) -> Match | None:
        """The first match anchored at `node`; a failure is kept in `failures`."""
        self._forget()
        try:
            found = self._search(node, overlook=0)
            if found is None and not self._is_complete():
                self._search(node, overlook=OVERLOOKED)
        except OutOfSteps:
            found = None
            self._forget()
            self._fail(
                STRUCTURE, self.anchor, "a match or its end within the step budget", f"neither in {STEP_BUDGET} steps",
                node, matched=self.total,
            )  # fmt: skip
        if found is None and self._best is not None:
            self.failures[node] = self._best
        return found

    def _forget(self) -> None:
        self._best: Failure | None = None

    def _is_complete(self) -> bool:
        """Whether the nearest failure is of a complete match."""
        return self._best is not None and self._best.rank != STRUCTURE

    def _search(self, node: Node, overlook: int) -> Match | None:
        """The first match anchored at `node`. Up to `overlook` wrong attributes or numbers do not end a search.

        Raises:
            OutOfSteps: the search was not at its end when the budget was.
        """
        self._vars: dict[str, Value | None] = {}
        self._nodes: dict[int, Node] = {}
        self._attributes: dict[str, Any] = {}
        self._outputs: list[Value] = []
        self._wrong: list[Wrong] = []
        self._overlook = overlook
        self._steps = 0
        for _ in self._anchored(node):
            if (found := self._accept()) is not None:
                return found
        return None

    def _anchored(self, node: Node) -> Iterator[None]:
        for index in range(len(node.outputs)):
            pattern = next((p for p in self._results() if p.node is self.anchor and p.index == index), None)
            if pattern is not None:
                for _ in self._solve((pattern, node.outputs[index], None, None)):
                    yield from self._climb(0)
                return

    def _results(self) -> Iterator[Result]:
        pending: list[Pattern | None] = [*self.source.outputs, self.source.reader]
        seen: set[int] = set()
        while pending:
            pattern = pending.pop(0)
            if pattern is None or id(pattern) in seen:
                continue
            seen.add(id(pattern))
            if isinstance(pattern, Result):
                yield pattern
                pending.extend(pattern.node.inputs)
            elif isinstance(pattern, Either):
                pending.extend(pattern.alternatives)
            elif isinstance(pattern, Absent):
                pending.append(pattern.present)

    def _solve(self, goals: Goals) -> Iterator[None]:
        """Every way to make each pattern of a chain of goals match its value."""
        if goals is None:
            yield
            return
        self._steps += 1
        if self._steps > self.budget:
            raise OutOfSteps
        pattern, value, by, rest = goals
        if isinstance(pattern, Result):
            yield from self._solve_node(pattern, value, by, rest)
        elif isinstance(pattern, Var):
            bound = self._vars.get(pattern.name, _UNBOUND)
            if bound is _UNBOUND:
                if value is None or (pattern.scalar and value.scalar is None):
                    self._mismatch(f"{pattern.name}, a scalar constant" if pattern.scalar else pattern.name, value)
                    return
                self._vars[pattern.name] = value
                yield from self._solve(rest)
                del self._vars[pattern.name]
            elif bound is value or _equal_constants(bound, value):
                yield from self._solve(rest)
            else:
                self._mismatch(f"{pattern.name} again ({describe(bound)})", value)
                yield from self._misread(by, f"{pattern.name} again ({describe(bound)})", value, rest, bound)
        elif isinstance(pattern, Either):
            for alternative in pattern.alternatives[:-1]:
                if not _is_elsewhere(alternative, value):
                    yield from self._solve((alternative, value, by, rest))
            yield from self._solve((pattern.alternatives[-1], value, by, rest))
        elif isinstance(pattern, Literal):
            if value is not None and pattern.accepts(value):
                yield from self._solve(rest)
            elif value is not None and value.scalar is not None and len(self._wrong) < self._overlook:
                self._wrong.append((self.anchor, f"constant {pattern}", describe(value), self._reader(value)))
                yield from self._solve(rest)
                self._wrong.pop()
            else:
                self._mismatch(f"constant {pattern}", value)
        elif isinstance(pattern, Absent):
            yield from self._solve(rest if value is None else (pattern.present, value, by, rest))
        elif value is None:
            yield from self._solve(rest)

    def _solve_node(self, pattern: Result, value: Value | None, by: Apply | None, rest: Goals) -> Iterator[None]:
        wanted = pattern.node
        node = value.producer if value is not None else None
        bound = self._nodes.get(id(wanted))
        if bound is not None:
            if node is bound and value is not None and value.index == pattern.index:
                yield from self._solve(rest)
            else:
                expected = f"the {wanted.op} at {name_of(bound)} again"
                self._fail(STRUCTURE, wanted, expected, describe(value), node)
                same = bound.outputs[pattern.index] if pattern.index < len(bound.outputs) else None
                yield from self._misread(by, expected, value, rest, same)
            return
        if node is None or value is None or not is_like(node, wanted) or value.index != pattern.index:
            self._fail(STRUCTURE, wanted, str(wanted), describe(value), node)
            yield from self._edited(pattern, value, by, rest)
            return
        captured: dict[str, Any] = {}
        before_wrong = len(self._wrong)
        for name, expected in wanted.attributes.items():
            actual = attribute(node, name)
            if isinstance(expected, Capture):
                captured[expected.name] = actual
            elif not _same(expected, actual):
                reason = (wanted, f"{wanted.op} with {name}={expected}", f"{name}={actual} at {name_of(node)}", node)
                if len(self._wrong) == self._overlook:
                    self._fail(STRUCTURE, *reason)
                    del self._wrong[before_wrong:]
                    return
                self._wrong.append(reason)
        inputs = list(node.inputs)
        more = any(extra is not None for extra in inputs[len(wanted.inputs) :])
        if more or node in self._nodes.values():
            expected = f"{wanted.op} of {len(wanted.inputs)} inputs" if more else f"another {wanted.op}"
            self._fail(STRUCTURE, wanted, expected, describe(value), node)
            if not more:
                yield from self._misread(by, expected, value, rest)
            del self._wrong[before_wrong:]
            return
        inputs += [None] * (len(wanted.inputs) - len(inputs))
        before = self._attributes
        self._attributes = {**before, **captured} if captured else before
        if wanted.op in COMMUTATIVE and not wanted.domain:
            yield from self._bind(wanted, node, permutations(wanted.inputs), rest)
        else:
            yield from self._bind(wanted, node, (wanted.inputs,), rest)
            yield from self._turned(wanted, node, rest)
        self._attributes = before
        del self._wrong[before_wrong:]

    def _bind(
        self, wanted: Apply, node: Node, orders: Iterable[tuple[Pattern | None, ...]], rest: Goals
    ) -> Iterator[None]:
        """Every way to match a node's inputs, in any of some orders, with the node bound."""
        self._nodes[id(wanted)] = node
        inputs = [*node.inputs, *[None] * (len(wanted.inputs) - len(node.inputs))]
        for order in orders:
            goals = rest
            # Inputs that are nodes of the pattern decide most; they are tried before variables, which match anything.
            for sub, given in sorted(
                zip(order, inputs[: len(order)], strict=True), key=lambda pair: isinstance(pair[0], (Result, Either))
            ):
                goals = (sub, given, wanted, goals)
            yield from self._solve(goals)
        del self._nodes[id(wanted)]

    # Where a match ends; `fuser.nearness` goes on.

    def _misread(
        self, by: Apply | None, expected: str, value: Value | None, rest: Goals, wanted: Value | None = None
    ) -> Iterator[None]:
        """`by` reads `value` and not what is expected."""
        return iter(())

    def _edited(self, pattern: Result, value: Value | None, by: Apply | None, rest: Goals) -> Iterator[None]:
        """`value`, which `by` reads, is made by another node than the pattern's."""
        return iter(())

    def _turned(self, wanted: Apply, node: Node, rest: Goals) -> Iterator[None]:
        """A node's inputs do not match in the order that they have."""
        return iter(())

    def _beside(self, wanted: Result, users: Iterable[Node]) -> list[Value]:
        """Nothing that reads a value is what the pattern has there."""
        return []

    def _climb(self, index: int) -> Iterator[None]:
        """Finds the pattern's outputs, from the first to the last, upward of what is bound."""
        if index == len(self.source.outputs):
            yield
            return
        pattern = self.source.outputs[index]
        tried = False
        for value in self._reachable(pattern):
            tried = True
            for _ in self._solve((pattern, value, None, None)):
                self._outputs.append(value)
                yield from self._climb(index + 1)
                self._outputs.pop()
        if not tried:
            self._unreachable(pattern)

    def _reachable(self, pattern: Pattern | None) -> list[Value]:
        """The values that may match `pattern`, found from what is bound already."""
        if isinstance(pattern, Var):
            value = self._vars.get(pattern.name)
            return [] if value is None else [value]
        if isinstance(pattern, Either):
            return list(dict.fromkeys(v for p in pattern.alternatives for v in self._reachable(p)))
        if not isinstance(pattern, Result):
            return []
        bound = self._nodes.get(id(pattern.node))
        if bound is not None:
            return [bound.outputs[pattern.index]]
        # What a bound node makes has few readers; what a variable stands for may have many.
        for sub in sorted(pattern.node.inputs, key=lambda sub: not self._is_bound(sub)):
            users = dict.fromkeys(user for value in self._reachable(sub) for user in value.consumers)
            found = [user.outputs[pattern.index] for user in users if is_like(user, pattern.node)]
            if found := found or self._beside(pattern, users):
                return found
        return []

    def _is_bound(self, pattern: Pattern | None) -> bool:
        """Whether some node of a pattern has its node in the graph."""
        if isinstance(pattern, Result) and id(pattern.node) in self._nodes:
            return True
        return pattern is not None and any(self._is_bound(sub) for sub in children(pattern))

    def _accept(self) -> Match | None:
        if self._wrong:
            first = min(self._wrong, key=lambda wrong: wrong[3].place or 0.0 if wrong[3] else 0.0)
            self._fail(STRUCTURE, *first, matched=min(len(self._nodes), self.total - len(self._wrong)))
            return None
        found = [(node, self._nodes[id(node)]) for node in self.source.nodes if id(node) in self._nodes]
        kept, beyond = (
            frozenset(node for wanted, node in found if flag(wanted))
            for flag in (attrgetter("kept"), attrgetter("beyond"))
        )
        match = Match(dict(self._vars), dict(self._attributes), dict(self._nodes), tuple(self._outputs), kept, beyond)
        region = match.region
        inside, outputs = set(region), set(match.outputs)
        for node in region:
            for value in node.outputs:
                if value in outputs:
                    continue
                reader = next((user for user, _ in value.uses if user not in inside), None)
                if reader is not None or value.pinned:
                    by = describe_node(reader) if reader else "the graph's outputs"
                    self._fail(
                        ESCAPE,
                        self.anchor,
                        f"{value.name} to be read only inside the match",
                        f"it is read by {by}",
                        node,
                        matched=self.total,
                    )
                    return None
        try:
            if not convex(region, match.outputs):
                raise CheckFailed("no path may lead out of the match and back in")
            inputs, attributes = self.source.read(match)
            given = [_as_value(x) for x in inputs]
            self.source.operator.output_shapes(given, attributes)
            for value in match.outputs:
                # The fused node gives its first input's type; a Cast behind it is then no part of the match.
                dtype = given[0].dtype if given[0] is not None else None
                require(None in (dtype, value.dtype) or value.dtype is dtype, f"{value.name} must be {dtype}", value)
        except NotThis:
            return None
        except CheckFailed as failed:
            there = describe(failed.place) if failed.place is not None else describe_node(region[-1])
            self._fail(CHECK, self.anchor, str(failed), there, _place(failed.place, region), matched=self.total)
            return None
        return match

    def _mismatch(self, expected: str, value: Value | None) -> None:
        self._fail(STRUCTURE, self.anchor, expected, describe(value), self._reader(value))

    def _reader(self, value: Value | None) -> Node | None:
        """The node to look at for a value that is not what it should be: what makes it, or what of the match reads it."""
        if value is not None and value.producer is not None:
            return value.producer
        return next((node for node in reversed(self._nodes.values()) if value in node.inputs), None)

    def _unreachable(self, pattern: Pattern | None) -> None:
        while isinstance(pattern, Either):
            pattern = pattern.alternatives[-1]
        if not isinstance(pattern, Result):
            return
        for sub in pattern.node.inputs:
            for value in self._reachable(sub):
                users = value.consumers
                found = ", ".join(describe_node(user) for user in users[:3]) or "no reader"
                self._fail(STRUCTURE, pattern.node, str(pattern.node), found, users[0] if users else value.producer)
                return
            # What reads the deepest value reached is where the graph and the pattern part.
            if isinstance(sub, (Result, Either)):
                self._unreachable(sub)
                return

    def _fail(
        self, rank: int, wanted: Apply, expected: str, found: str, place: Node | None, matched: int | None = None
    ) -> None:
        if matched is None:
            matched = min(len(self._nodes), self.total - 1) - len(self._wrong)
        failure = Failure(
            rank, matched, self.total, wanted.line, expected, found, place, frozenset(self._nodes.values())
        )
        if self._best is None or failure.closeness > self._best.closeness:
            self._best = failure


def _is_elsewhere(pattern: Pattern, value: Value | None) -> bool:
    """Whether an alternative is out of the question at once: a node of another operator than the one that stands there."""
    if not isinstance(pattern, Result):
        return False
    return value is None or value.producer is None or not is_like(value.producer, pattern.node)


def _place(value: Value | None, region: list[Node]) -> Node:
    """The node to look at for a value: the one that makes it; for an input or a constant the one that reads it."""
    if value is not None and value.producer is not None:
        return value.producer
    return next((node for node in region if value is not None and value in node.inputs), region[-1])


def _as_value(given: Any) -> Value | None:
    """A new constant stands in for its future value when shapes are checked."""
    if given is None or isinstance(given, Value):
        return given
    return Value("merged", given.dtype, given.shape, constant=given)


def _equal_constants(a: Any, b: Value | None) -> bool:
    """Two constants that are the same small number are the same value for a pattern."""
    return a is not None and b is not None and a.scalar is not None and a.scalar == b.scalar and a.shape == b.shape


def convex(region: list[Node], outputs: tuple[Value, ...]) -> bool:
    """Whether no path leaves the region and comes back: only then can it become one node."""
    if len(outputs) == 1:
        return True  # every path out starts at the end
    inside = set(region)
    last = max(node.place or 0.0 for node in region)
    outward = [user for value in outputs for user in readers(value) if user not in inside]
    starts = [value for user in outward for value in user.outputs]
    return not (reaches(starts, lambda node: (node.place or 0.0) > last) & inside) and not (set(outward) & inside)


def anchors(source: Source, counts: Mapping[tuple[str, str], int]) -> list[Apply]:
    """The nodes every match of a source replaces, one of each operator, the rarest first: what is kept may serve many."""
    found: dict[tuple[str, str], Apply] = {}
    for node in sorted(
        (node for node in source.required if not node.kept),
        key=lambda node: (counts.get((node.domain, node.op), 0), source.nodes.index(node)),
    ):
        found.setdefault((node.domain, node.op), node)
    return list(found.values())


def operator_counts(graph: Graph) -> Counter[tuple[str, str]]:
    """How often each (domain, operator) stands in a graph."""
    return Counter((node.domain, node.op) for node in graph.nodes)
