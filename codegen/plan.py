"""The planner: from fused nodes to kernel launches, each a prologue, a main loop and an epilogue.

For few tokens (decode) a launch is bound by the bytes it reads, and a norm costs nothing when it is computed again by every
program of the product that reads it; for many (prefill) norms are launches of their own. In both a residual add belongs to
the product before it, an activation and a gate to the product they follow, and rotary embedding with its cache write to the
projection. A mask that has a closed form is computed by the attention that reads it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fuser import dims
from fuser.dims import Dim
from fuser.graph import FUSER, Graph, Node, Origin, Value
from fuser.shapes import infer

Regime = Literal["decode", "prefill"]
Role = Literal["prologue", "main", "epilogue"]
REGIMES = ("decode", "prefill")
Item = TypeVar("Item")

# What moves or says nothing of elements that a kernel addresses for itself.
VIEWS = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Split", "Slice", "Identity"})
ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Cast", "Sigmoid", "Tanh", "Relu", "Erf", "Sqrt", "Exp", "Where", "Clip"}
)
ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh", "gated_mlp"})
NORMS = frozenset({"rms_norm", "layer_norm"})
# Operations for each element of the (first) result; of others one. exp, tanh and sqrt are one each.
OPERATIONS = {
    "rms_norm": 4, "layer_norm": 7, "silu": 3, "gelu": 5, "gelu_tanh": 9, "gated_mlp": 4, "rotary": 3, "Sigmoid": 3,
    "fake_quantize": 4,
}  # fmt: skip
WRITES = frozenset({"rotary", "rotary_cache_write", "cache_write"})
POSITIONAL = frozenset({"attention_mask", "rotary_table", "position_ids"})


@dataclass(eq=False)
class Launch:
    """One kernel launch: which nodes it computes, in which part of the kernel."""

    family: str  # linear, attention, rows, gather, positions, or an operator that no family computes
    parts: list[tuple[Role, Node]] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return [node for _, node in self.parts]

    @property
    def outputs(self) -> list[Value]:
        """What is read by other launches, or is an output of the graph."""
        own = set(map(id, self.nodes))
        return [
            value
            for node in self.nodes
            for value in node.outputs
            if value.is_output or any(id(user) not in own for user in value.consumers)
        ]

    @property
    def inputs(self) -> list[Value]:
        """What it reads from memory, each once."""
        made = {id(value) for node in self.nodes for value in node.outputs}
        return list(dict.fromkeys(v for node in self.nodes for v in node.inputs if v is not None and id(v) not in made))

    @property
    def origin(self) -> Origin:
        return Origin.union(node.origin for node in self.nodes)

    @property
    def bytes(self) -> Dim:
        """Bytes read and written, each tensor once, as a function of the graph's sizes; of a past, what is appended."""
        total: Dim = 0
        for _, size in self.moved:
            total = dims.add(total, size)
        return total

    @property
    def moved(self) -> list[tuple[Value, Dim]]:
        """What is read and written, with its bytes."""
        return [(v, _bytes(v)) for v in self._read()] + [(v, _written(v)) for v in self.outputs]

    def _read(self) -> Iterator[Value]:
        for value in self.inputs:
            users = [node for node in self.nodes if any(v is value for v in node.inputs)]
            if all(node.op in WRITES and value in node.inputs[-2:] and node.op != "rotary" for node in users):
                continue  # a past that is appended to in place
            if value.producer is not None and _masks_alone(value.producer):
                continue  # computed where it is read
            if all(node.is_a("Gather") and node.inputs[0] is value for node in users):
                continue  # of a table the rows that are written
            yield value

    @property
    def flops(self) -> Dim:
        """Floating-point operations, a multiply-add as two, as a function of the graph's sizes."""
        total: Dim = 0
        for node in self.nodes:
            total = dims.add(total, _flops(node))
        return total


def plan(graph: Graph, regime: Regime = "decode") -> list[Launch]:
    """The launches that compute a fused graph, in an order in which they can be made. The graph is left as it is.

    What depends on sizes alone (`Dims`) is no launch: it is computed on the host.
    """
    return grouped(split(graph), regime)


def grouped(graph: Graph, regime: Regime) -> list[Launch]:
    """The launches of a graph whose norms have been split from their residual adds."""
    launches: list[Launch] = []
    owner: dict[Node, Launch] = {}

    def put(launch: Launch, role: Role, node: Node) -> None:
        launch.parts.append((role, node))
        owner[node] = launch

    positional = _positional(graph)
    for node in sorted(graph.nodes, key=lambda node: node not in positional):  # tables come before all layers
        if node in owner or _is_host(node) or _masks_alone(node):
            continue
        if regime == "decode" and node.op in NORMS and node.domain == FUSER and _feeds_products_alone(node):
            continue  # computed by those who read it
        launch = Launch(_family(node))
        launches.append(launch)
        for value in node.inputs:
            norm = value.producer if value is not None else None
            if launch.family == "linear" and norm is not None and norm not in owner and norm.op in NORMS:
                launch.parts.append(("prologue", norm))
        put(launch, "main", node)
        while (following := _following(launch, owner)) is not None:
            put(launch, "epilogue", following)
    return launches


def split(graph: Graph) -> Graph:
    """A copy in which a norm with its residual add is two nodes: one goes with what follows, the other with what was before."""
    graph = graph.clone()
    for node in list(graph.nodes):
        if node.domain != FUSER or node.op not in ("skip_rms_norm", "skip_layer_norm"):
            continue
        x, skip, *others = node.inputs
        total = graph.add("Add", [x, skip], like=node)
        norm = graph.add(
            node.op.removeprefix("skip_"), [total.output, *others], node.attributes, domain=FUSER, like=node
        )
        for old, new in zip(node.outputs, (norm.output, total.output), strict=False):
            new.dtype, new.shape = old.dtype, old.shape
            graph.replace(old, new)
        total.output.dtype, total.output.shape = norm.output.dtype, norm.output.shape
        graph.remove(node)
    graph.sort()
    infer(graph)
    return graph


def _is_host(node: Node) -> bool:
    """Whether a node says something of sizes or is computed from nothing else, so that no kernel is launched for it."""
    return node.is_a("Dims", FUSER) or all(value is None or value.constant is not None for value in node.inputs)


def _is_linear(node: Node) -> bool:
    if node.is_a("packed_linear", FUSER):
        return True
    weight = node.input(1)
    if weight is not None and weight.producer is not None and weight.producer.is_a("Transpose"):
        weight = weight.producer.inputs[0]  # one that is tied to the embedding is stored once
    return node.is_a("MatMul") and weight is not None and weight.constant is not None


def _family(node: Node) -> str:
    if _is_linear(node):
        return "linear"
    if node.domain == FUSER and node.op == "attention":
        return "attention"
    if node.domain == FUSER and node.op in POSITIONAL:
        return "positions"
    if (node.domain == FUSER and node.op in NORMS | ACTIVATIONS | WRITES) or (
        not node.domain and node.op in ELEMENTWISE | VIEWS
    ):
        return "rows"
    return "gather" if node.is_a("Gather") else node.op


def _positional(graph: Graph) -> set[Node]:
    """The nodes that depend on positions, padding and sizes alone, by way of what is recognised."""
    found: set[Node] = set()
    for node in graph.nodes:
        made = [value.producer for value in node.inputs if value is not None and value.producer is not None]
        is_closed = node.domain == FUSER and node.op in POSITIONAL
        if is_closed or (made and not node.domain and node.op in ELEMENTWISE | VIEWS and found.issuperset(made)):
            found.add(node)
    return found


def _masks_alone(node: Node) -> bool:
    """Whether a node makes a mask of closed form, or a number of one, that attention alone reads."""
    if node.is_a("attention_mask", FUSER):
        return _is_read_by_attention(node)
    chosen = node.inputs[0] if node.is_a("Where") else None
    return chosen is not None and chosen.producer is not None and _masks_alone(chosen.producer)


def _is_read_by_attention(node: Node) -> bool:
    return not node.output.is_output and all(
        user.is_a("attention", FUSER) or (user.is_a("Where") and _is_read_by_attention(user))
        for user in node.output.consumers
    )


def _feeds_products_alone(node: Node) -> bool:
    output = node.output
    return not output.is_output and bool(output.consumers) and all(map(_is_linear, output.consumers))


def _following(launch: Launch, owner: Mapping[Node, Launch]) -> Node | None:
    """The next node that the launch can compute on what it holds: whatever else it reads, launches before it have made."""
    if launch.family not in ("linear", "attention", "rows", "positions"):
        return None
    own = set(map(id, launch.nodes))
    for value in (value for node in launch.nodes for value in node.outputs):
        for user in value.consumers:
            makers = [v.producer for v in user.inputs if v is not None and v.producer is not None]
            if (
                user not in owner
                and _is_epilogue(launch, user)
                and all(id(maker) in own or maker in owner or _is_host(maker) for maker in makers)
            ):
                return user
    return None


def _is_epilogue(launch: Launch, node: Node) -> bool:
    """Whether a node can be computed on a tile of the main loop's result."""
    if launch.family == "attention":
        return not node.domain and node.op in VIEWS
    if launch.family == "positions":
        return not node.domain and node.op in ELEMENTWISE | VIEWS
    if not node.domain:
        return node.op in ELEMENTWISE | VIEWS
    if node.domain != FUSER:
        return False
    if node.op in NORMS:
        return launch.family == "linear" and _is_by_head(launch, node)
    return node.op in ACTIVATIONS | WRITES


def _is_by_head(launch: Launch, node: Node) -> bool:
    """Whether a norm is over the width of a head, which one tile holds whole, and not over the rows of a product."""
    value, main = node.inputs[0], next(part for role, part in launch.parts if role == "main")
    width = main.output.shape[-1] if main.output.shape else None
    return value is not None and value.shape is not None and len(value.shape) == 4 and value.shape[-1] != width


def _elements(value: Value) -> Dim:
    return dims.product(value.shape or ())


def _bytes(value: Value) -> Dim:
    if value.constant is not None:
        return value.constant.stored_bytes  # of codes, where it is quantized
    bits = value.dtype.bits if value.dtype is not None else 0
    return dims.mul(_elements(value), max(1, bits // 8))


def _written(value: Value) -> Dim:
    """The bytes of an output; of a cache, those of the new tokens."""
    node = value.producer
    if node is None or node.op not in WRITES or node.op == "rotary" or value not in node.outputs[-2:]:
        return _bytes(value)
    past = node.inputs[-2 + node.outputs[-2:].index(value)]
    return dims.sub(_bytes(value), _bytes(past)) if past is not None else _bytes(value)


def _flops(node: Node) -> Dim:
    if _is_linear(node):
        weight = node.inputs[1]
        rows = dims.product((node.inputs[0].shape or ())[:-1]) if node.inputs[0] is not None else 0
        return dims.mul(dims.mul(2, rows), _elements(weight)) if weight is not None else 0
    if node.is_a("attention", FUSER):
        q, k = node.inputs[0], node.inputs[1]
        if q is None or k is None or k.shape is None:
            return 0
        T = k.shape[2 if len(k.shape) == 4 else 1]
        return dims.mul(dims.mul(4, _elements(q)), T)
    if node.is_a("MatMul") and node.inputs[0] is not None:  # of two activations
        K = (node.inputs[0].shape or (0,))[-1]
        return dims.mul(dims.mul(2, _elements(node.output)), K)
    if node.op in VIEWS or node.op in ("Gather", "Concat", "cache_write"):
        return 0
    if node.op == "rotary_cache_write":  # of queries and of new keys
        turned = dims.add(_elements(node.output), _elements(node.inputs[1]) if node.inputs[1] is not None else 0)
        return dims.mul(OPERATIONS["rotary"], turned)
    return dims.mul(OPERATIONS.get(node.op, 1), _elements(node.output))


def at(amount: Dim, sizes: Mapping[str, int]) -> int | None:
    """An amount in numbers, the sizes of symbols given by name; None where one is missing."""
    if isinstance(amount, int):
        return amount
    known: dict[Any, int] = {symbol: sizes[str(symbol)] for symbol in amount.free_symbols if str(symbol) in sizes}
    found = dims.substitute(amount, known)
    return found if isinstance(found, int) else None


def text(launches: Sequence[Launch], sizes: Mapping[str, int] | None = None) -> str:
    """The plan for people: a line a launch, repeated layers once."""
    lines = []
    for count, run in folded(launches):
        if count > 1:
            lines.append(f"{count} times:")
        lines += [("    " if count > 1 else "") + _line(launch, sizes or {}) for launch in run]
    return "\n".join(lines)


def _line(launch: Launch, sizes: Mapping[str, int]) -> str:
    roles = {role: [node.op for r, node in launch.parts if r == role] for role in ("prologue", "main", "epilogue")}
    steps = [*roles["prologue"], *(op if op not in VIEWS else "" for op in (*roles["main"], *roles["epilogue"]))]
    what = " + ".join(step for step in steps if step) or " + ".join(roles["main"])
    moved, done = at(launch.bytes, sizes), at(launch.flops, sizes)
    amounts = [f"{amount(moved)}B" if moved is not None else f"{launch.bytes} B"]
    amounts.append(f"{amount(done)}FLOP" if done is not None else f"{launch.flops} FLOP")
    return f"{launch.family:<10} {what:<58} {amounts[0]:>12} {amounts[1]:>12}  {launch.origin.module}"


def amount(number: float) -> str:
    """A number of three digits, with the prefix of its unit."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def folded(launches: Sequence[Launch]) -> list[tuple[int, list[Launch]]]:
    """Launches with runs of the same kind told once: (how often, the launches of one)."""
    return repeated(launches, [_kind(launch) for launch in launches])


def repeated(items: Sequence[Item], kinds: Sequence[Any]) -> list[tuple[int, list[Item]]]:
    """Items with runs of equal kinds, of any period, told once: (how often, the items of one)."""
    found: list[tuple[int, list[Item]]] = []
    start = 0
    while start < len(kinds):
        best = (1, 1)  # (repeats, period), by how much they cover
        for period in range(1, min(64, (len(kinds) - start) // 2) + 1):
            repeats = 1
            while kinds[start + repeats * period : start + (repeats + 1) * period] == kinds[start : start + period]:
                repeats += 1
            if repeats > 1 and repeats * period > best[0] * best[1]:
                best = (repeats, period)
        repeats, period = best
        found.append((repeats, list(items[start : start + period])))
        start += repeats * period
    return found


def _kind(launch: Launch) -> Any:
    return tuple(
        (role, node.op, tuple(value.shape for value in node.outputs), tuple(_shapes(node.inputs)))
        for role, node in launch.parts
    )


def _shapes(values: Iterable[Value | None]) -> Iterator[Any]:
    for value in values:
        yield None if value is None else value.shape
