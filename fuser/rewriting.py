"""Applying patterns: match, check, replace; and keeping the reason wherever that stopped short."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from fuser.checking import Checker, Rewrite
from fuser.constants import Constant
from fuser.fused import FusedOp, Source
from fuser.graph import FUSER, Graph, Node, Origin, Value
from fuser.matching import CHECK, Failure, Matcher, anchors, operator_counts
from fuser.nearness import Nearest
from fuser.pattern import Match
from fuser.recognition import Refusal, recognize

# How much of a pattern must match before a structural failure counts as a near miss.
NEAR = 0.6
NEAR_NODES = 3
NEAR_AT_BEST = 0.65  # ... where what is wrong was passed over
ANCHORS = 2  # from which a place that is left is looked at


@dataclass(frozen=True)
class Fused:
    """A fused node: what it is counted as, the source nodes it stands for, the line of the source that matched, and its
    relative error in the check (None: it was recognised by what it holds, or nothing was checked)."""

    kind: str
    operator: str
    sources: tuple[str, ...]
    line: str
    error: float | None = None


@dataclass(frozen=True)
class Place:
    """One place of a near miss: the node to look at by its source nodes, those of all that had matched, the reason."""

    at: tuple[str, ...]
    sources: tuple[str, ...]
    module: str
    expected: str
    found: str

    @property
    def node(self) -> str:
        """The name of the node to look at."""
        return self.at[0]


@dataclass
class Miss:
    """Near misses that are alike: a fusion, the line where its pattern and the graph part, and every place."""

    fusion: str
    matched: int
    total: int
    line: str
    rank: int
    places: list[Place] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.places)

    # Of the first place, which stands for all.

    @property
    def module(self) -> str:
        return self.places[0].module

    @property
    def node(self) -> str:
        return self.places[0].node

    @property
    def expected(self) -> str:
        return self.places[0].expected

    @property
    def found(self) -> str:
        return self.places[0].found


@dataclass
class Outcome:
    """What matching and rewriting did."""

    fused: dict[str, int] = field(default_factory=dict)
    constructs: list[Fused] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    recognize_s: float = 0.0
    match_s: float = 0.0
    check_s: float = 0.0
    checked: int = 0
    reused: int = 0


def rewrite(graph: Graph, operators: Sequence[FusedOp], *, verify: bool = True) -> Outcome:
    """Replaces every place an operator's sources match by one fused node. The graph stays valid after each.

    Args:
        graph: a canonical graph; changed in place.
        operators: in the order they are tried; later ones may match earlier ones' nodes.
        verify: check every rewrite numerically first (each distinct structure once).
    """
    outcome, checker = Outcome(), Checker(graph.opset)
    failures: list[tuple[FusedOp, Failure, Node]] = []
    made: dict[Node, tuple[str, float | None]] = {}  # by which line, with what error
    start = perf_counter()
    refusals = recognize(graph, operators)
    outcome.recognize_s = perf_counter() - start
    for operator in operators:
        for source in operator.sources:
            failures += _apply(graph, operator, source, checker if verify else None, outcome, made)
        graph.sort()
    graph.prune()
    for node in graph.nodes:
        operator_of_node = next((op for op in operators if node.is_a(op.name, FUSER)), None)
        if operator_of_node is not None:
            kind = operator_of_node.kind_of(node)
            outcome.fused[kind] = outcome.fused.get(kind, 0) + 1
            outcome.constructs.append(Fused(kind, node.op, node.origin.sources, *made.get(node, ("", None))))
    outcome.misses = _near_misses(graph, _nearest(graph, operators) + failures) + _refused(graph, refusals)
    outcome.checked, outcome.reused = checker.checked, checker.reused
    return outcome


MOVES = frozenset(
    {"Add", "And", "Cast", "Expand", "Max", "Min", "Mul", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Where"}
)

LOOKUPS = frozenset({"Concat", "Cos", "Gather", "Sin", "rotary_table"})


def _refused(graph: Graph, refusals: Sequence[Refusal]) -> list[Miss]:
    """What was looked at closely and is no closed form, where it masks an attention or turns its queries and keys."""
    misses = []
    for refusal in refusals:
        nodes, value = refusal.subject.nodes, refusal.subject.value
        left = [output for node in nodes if node in graph.nodes for output in node.outputs]
        if not (_masks(value) or any(map(_turns, left))):
            continue
        maker = nodes[-1]
        at = maker.origin.sources or (value.name,)
        place = Place(at, at, maker.origin.module, refusal.expected, refusal.found)
        misses.append(Miss(refusal.operator, len(nodes), len(nodes), refusal.line, CHECK, [place]))
    return misses


def _masks(value: Value) -> bool:
    """Whether a value flows into the scores of an attention, and into no product before."""
    seen: set[Node] = set()
    pending = [(node, value) for node in value.consumers]
    while pending:
        node, given = pending.pop()
        if node.is_a("Softmax") or (node.op in ("attention", "Attention") and given in node.inputs[3:4]):
            return True
        if node not in seen and node.op in MOVES and not node.domain:
            seen.add(node)
            pending.extend((user, output) for output in node.outputs for user in output.consumers)
    return False


def _turns(value: Value) -> bool:
    """Whether a value is, or indexes, a table of a rotary embedding."""
    pending, seen = [value], {id(value)}
    while pending:
        for user, index in pending.pop().uses:
            if user.op in ("rotary", "rotary_cache_write", "RotaryEmbedding") and index > 0:
                return True
            if user.op in LOOKUPS or (user.op in MOVES and not user.domain):
                pending += [output for output in user.outputs if id(output) not in seen]
                seen |= {id(output) for output in user.outputs}
    return False


def _apply(
    graph: Graph,
    operator: FusedOp,
    source: Source,
    checker: Checker | None,
    outcome: Outcome,
    made: dict[Node, tuple[str, float | None]],
) -> list[tuple[FusedOp, Failure, Node]]:
    start = perf_counter()
    checking = outcome.check_s
    matcher = Matcher(graph, source, operator_counts(graph))
    for anchor in matcher.candidates():
        if anchor not in graph.nodes:
            continue
        match = matcher.match(anchor)
        if match is None:
            continue
        inputs, attributes = source.read(match)
        proposal = Rewrite(match.region, match.outputs, operator, inputs, attributes, match.context)
        if checker is not None:
            before = perf_counter()
            disagreement = checker.check(proposal)
            outcome.check_s += perf_counter() - before
            if disagreement is not None:
                expected = f"the fused node must compute the same as the {len(match.region)} nodes it replaces"
                matcher.failures[anchor] = Failure(
                    CHECK, matcher.total, matcher.total, matcher.anchor.line, expected, disagreement, anchor,
                    frozenset(match.region),
                )  # fmt: skip
                continue
        made[replace(graph, proposal, match)] = source.line, None if checker is None else checker.error
    outcome.match_s += perf_counter() - start - (outcome.check_s - checking)
    return [(operator, failure, anchor) for anchor, failure in matcher.failures.items()]


def replace(graph: Graph, proposal: Rewrite, match: Match) -> Node:
    """Puts the fused node in the region's place; it takes over the region's outputs, names and origins."""
    operator, region = proposal.operator, match.region
    inputs = [_input(graph, operator, given, i) for i, given in enumerate(proposal.inputs)]
    while inputs and inputs[-1] is None:
        inputs.pop()
    outputs = list(match.outputs)
    # A source may be without the last outputs (the sum that a contributed node was not asked for); nothing reads them.
    outputs += [
        Value(graph.fresh_name(f"{outputs[0].name}_{argument.name}"), outputs[0].dtype)
        for argument in operator.signature.outputs[len(outputs) :]
    ]
    node = Node(operator.name, inputs, outputs, dict(proposal.attributes), FUSER)
    node.origin = Origin.union(part.origin for part in region)
    for part in reversed(region):
        for value in part.outputs:
            if value not in match.outputs:
                value.uses.clear()
        graph.remove(part)
    shapes = operator.output_shapes(inputs, proposal.attributes)
    for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
        value.producer, value.index = node, index
        value.shape = shape
    # It stands where the region ended, or where it began when something in between reads what it makes.
    last_input = max(
        (v.producer.place or 0.0 for v in inputs if v is not None and v.producer is not None), default=-1.0
    )
    first_reader = min((user.place or 0.0 for value in node.outputs for user in value.consumers), default=float("inf"))
    places = [part.place or 0.0 for part in (region[-1], region[0])]
    fitting = [place for place in places if last_input < place < first_reader]
    node.place = fitting[0] if fitting else places[0]
    graph.insert(node)
    if not fitting:
        graph.sort()
    return node


def _input(graph: Graph, operator: FusedOp, given: Value | Constant | None, index: int) -> Value | None:
    if not isinstance(given, Constant):
        return given
    if given.key not in graph.derived:
        graph.derived[given.key] = graph.constant(given, f"{operator.name}_{operator.signature.inputs[index].name}")
    return graph.derived[given.key]


def _nearest(graph: Graph, operators: Sequence[FusedOp]) -> list[tuple[FusedOp, Failure, Node]]:
    """What the places left are nearest to, looked at from two nodes of each pattern: one of them may be what is wrong."""
    counts, found = operator_counts(graph), []
    for operator in operators:
        for source in operator.sources:
            if source.size <= NEAR_NODES:
                continue
            for start in anchors(source, counts)[:ANCHORS]:
                matcher = Nearest(graph, source, counts, start)
                for anchor in matcher.candidates():
                    failure = matcher.nearest(anchor)
                    if failure is not None and failure.matched >= NEAR_AT_BEST * failure.total:
                        found.append((operator, failure, anchor))
    return found


def _near_misses(graph: Graph, failures: list[tuple[FusedOp, Failure, Node]]) -> list[Miss]:
    """The failures whose place is still unfused, each place's closest one, like ones folded into one, closest first."""
    closest: dict[Node, tuple[FusedOp, Failure]] = {}
    for operator, failure, anchor in failures:
        if anchor not in graph.nodes or not _is_near(failure):
            continue
        if anchor not in closest or failure.closeness > closest[anchor][1].closeness:
            closest[anchor] = (operator, failure)
    ranked = sorted(closest.items(), key=lambda item: (item[1][1].rank, -len(item[1][1].nodes)))
    misses: dict[tuple[str, str, int, int, str], Miss] = {}
    explained: list[frozenset[Node]] = []
    for anchor, (operator, failure) in ranked:
        if any(2 * len(failure.nodes & nodes) > len(failure.nodes) for nodes in explained):
            continue  # most of the place is reported already: the norm inside a LayerNorm
        explained.append(failure.nodes)
        place = failure.place if failure.place is not None else anchor
        reason = failure.expected if failure.rank == CHECK else ""  # other reasons name the values of one place
        key = (operator.name, failure.line, failure.rank, failure.matched, reason)
        if key not in misses:
            misses[key] = Miss(operator.name, failure.matched, failure.total, failure.line, failure.rank)
        misses[key].places.append(
            Place(
                place.origin.sources or (place.name or place.op,),
                tuple(dict.fromkeys(s for node in (*_ordered(failure.nodes), anchor) for s in node.origin.sources)),
                anchor.origin.module or place.origin.module,
                failure.expected,
                failure.found,
            )
        )
    return sorted(misses.values(), key=lambda miss: (miss.rank, -miss.matched / max(1, miss.total)))


def _ordered(nodes: Iterable[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: node.place or 0.0)


def _is_near(failure: Failure) -> bool:
    if failure.rank != 2:
        return True
    return failure.matched >= NEAR_NODES and failure.matched / max(1, failure.total) >= NEAR
