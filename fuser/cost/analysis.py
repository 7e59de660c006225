"""What the launches of a fused graph ask for, as functions of batch, new tokens and past: FLOPs, and bytes by their kind.

Whether a launch is bound by bytes or by arithmetic, and from which batch on, follows for a GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy

from fuser import dims
from fuser.codegen.plan import WRITES, Launch, Regime, amount, plan, repeated
from fuser.codegen.step_inputs import inputs_of, past_of, tokens_of
from fuser.constants import Constant
from fuser.cost.gpus import GPU
from fuser.cost.modules import Made, graph_of
from fuser.cost.planning import OURS, Assumptions
from fuser.cost.workload import Operator, Workload
from fuser.dims import Dim
from fuser.errors import InputError, UnsupportedOperator
from fuser.graph import FUSER, Graph, Node, Value
from fuser.pipeline import Progress

BATCH, SEQUENCE, PAST = (dims.symbol(name) for name in ("batch", "sequence", "past"))


@dataclass(frozen=True, eq=False)
class Cost:
    """What a launch asks for; amounts are numbers, or expressions in batch, sequence (new tokens of each) and past.

    Attributes:
        name: what it is for: qkv, attention, o, feed-forward A and B, head, norm, ...
        flops: a multiply-add is two.
        parameters: bytes of weights read; codes where they are quantized.
        activations: bytes of activations read and written.
        cache: bytes of keys and values read and written.
        count: how many layers have it.
    """

    name: str
    launch: Launch
    flops: Dim
    parameters: Dim
    activations: Dim
    cache: Dim
    count: int = 1

    @property
    def bytes(self) -> Dim:
        return dims.add(dims.add(self.parameters, self.activations), self.cache)

    @property
    def intensity(self) -> sympy.Expr:
        """FLOPs a byte."""
        return sympy.sympify(self.flops) / self.bytes

    def at(self, *, batch: int = 1, sequence: int = 1, past: int = 512) -> "Cost":
        """The same in numbers."""
        known: dict[sympy.Symbol, Dim] = {BATCH: batch, SEQUENCE: sequence, PAST: past}
        flops, parameters, activations, cache = (
            dims.substitute(one, known) for one in (self.flops, self.parameters, self.activations, self.cache)
        )
        return Cost(self.name, self.launch, flops, parameters, activations, cache, self.count)

    def is_compute_bound(self, gpu: GPU, assumptions: Assumptions = OURS, **sizes: int) -> bool:
        """On which side of the GPU's roofline it falls."""
        found = self.at(**sizes)
        return bool(found.flops > ridge(gpu, assumptions) * found.bytes)

    def crossover(
        self, gpu: GPU, assumptions: Assumptions = OURS, *, sequence: int = 1, past: int = 512
    ) -> float | None:
        """The batch from which on its arithmetic takes longer than its bytes; None: never."""
        known: dict[sympy.Symbol, Dim] = {SEQUENCE: sequence, PAST: past}
        flops, moved = (sympy.Poly(dims.substitute(one, known), BATCH) for one in (self.flops, self.bytes))
        excess = flops - ridge(gpu, assumptions) * moved  # linear in the batch
        slope, start = float(excess.coeff_monomial(BATCH)), float(excess.coeff_monomial(1))
        return max(-start / slope, 0.0) if slope > 0 else None


def ridge(gpu: GPU, assumptions: Assumptions = OURS, kind: str | None = None) -> float:
    """FLOPs a byte at which a GPU's arithmetic takes as long as its bytes."""
    return gpu.rate(kind) * 1e12 * assumptions.compute / (gpu.bandwidth_gb_s * 1e9 * assumptions.bandwidth)


def analyze(graph: Graph, regime: Regime = "decode") -> list[Cost]:
    """What each launch of a fused decoder asks for, repeated layers once with their count."""
    launches = plan(graph, regime)
    known = _symbols(graph)
    names = roles(launches)
    kinds = [(name, *_key(launch)) for name, launch in zip(names, launches, strict=True)]
    found: list[Cost] = []
    for count, run in repeated(list(zip(names, launches, strict=True)), kinds):
        for name, launch in run:
            amounts = (launch.flops, *traffic(launch))
            flops, parameters, activations, cache = (dims.substitute(one, known) for one in amounts)
            found.append(Cost(name, launch, flops, parameters, activations, cache, count))
    return found


def scaled(costs: Iterable[Cost], made: Made) -> list[Cost]:
    """Costs of a graph whose few layers stand for a shape's, with the shape's count."""
    return [replace(cost, count=made.layers) if cost.count == made.made_layers else cost for cost in costs]


def _symbols(graph: Graph) -> dict[sympy.Symbol, Dim]:
    """A graph's own dims by what they count: batch, new tokens, past; padding is as long as both together."""
    tokens, past = tokens_of(inputs_of(graph)), past_of(graph)
    own = {tokens.batch: BATCH, tokens.sequence: SEQUENCE, past: PAST}
    known: dict[sympy.Symbol, Dim] = {dim: symbol for dim, symbol in own.items() if isinstance(dim, sympy.Symbol)}
    rest = {symbol for value in graph.inputs for symbol in dims.symbols(value.shape or ())} - known.keys()
    return known | dict.fromkeys(rest, dims.add(PAST, SEQUENCE))


def _key(launch: Launch) -> tuple[Any, ...]:
    return tuple(
        (role, node.op, tuple(v.shape for v in node.outputs), tuple(v.shape if v is not None else None for v in node.inputs))
        for role, node in launch.parts
    )  # fmt: skip


def roles(launches: Sequence[Launch]) -> list[str]:
    """What each launch is for, by what it computes and what flows into it; norms before attention are A, others B."""
    made = {id(value): launch for launch in launches for value in launch.outputs}
    found: list[str] = []
    for launch in launches:
        main = _main(launch)
        if launch.family == "linear":
            found.append(_product_role(launch, main, made))
        elif main.op in ("rms_norm", "layer_norm"):
            found.append(_norm_role(launch))
        elif launch.family == "gather" and main.inputs[0] is not None and main.inputs[0].constant is not None:
            found.append("embedding")
        else:
            found.append({"rotary_cache_write": "rotary, cache write", "positions": "positions"}.get(main.op, main.op))
    return found


def _main(launch: Launch) -> Node:
    return next((node for role, node in launch.parts if role == "main"), launch.nodes[0])


def _product_role(launch: Launch, main: Node, made: dict[int, Launch]) -> str:
    if main.is_a("packed_linear", FUSER):
        return "qkv" if main.attributes["role"] == "qkv" else "feed-forward A"
    if any(value.is_output and value.rank == 3 for value in launch.outputs):
        return "head"
    if any(node.domain == FUSER and node.op in ("silu", "gelu", "gelu_tanh", "gated_mlp") for node in launch.nodes):
        return "feed-forward A"
    source = made.get(id(launch.inputs[0])) if launch.inputs else None
    before = _through(launch, made)
    if source is not None and "attention" in (source.family, *before):
        return "o"
    if any(op in ("gated_mlp", "silu", "gelu", "gelu_tanh", "Relu") for op in before):
        return "feed-forward B"
    if any(node.op in WRITES for node in launch.nodes) or _reaches_attention(launch):
        return "qkv"
    return "product"


def _through(launch: Launch, made: dict[int, Launch]) -> list[str]:
    """The operators of the launches that made what the product reads, views and roundings left out."""
    found: list[str] = []
    pending = [launch.inputs[0]] if launch.inputs else []
    while pending:
        maker = made.get(id(pending.pop()))
        if maker is None:
            continue
        found += [node.op for node in maker.nodes]
        if _main(maker).op == "fake_quantize" or (maker.family == "rows" and not {"gated_mlp"} & set(found)):
            pending += [value for value in maker.inputs if value.constant is None][:1]
    return found


def _reaches_attention(launch: Launch) -> bool:
    pending, seen = list(launch.outputs), set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        for node in value.consumers:
            if node.is_a("attention", FUSER):
                return True
            if not node.is_a("MatMul") and not node.is_a("packed_linear", FUSER) and node.op != "Add":
                pending += node.outputs
    return False


def _norm_role(launch: Launch) -> str:
    users = [node for value in launch.outputs for node in value.consumers]
    users += [node for user in users if user.op == "fake_quantize" for node in user.output.consumers]
    if any(node.is_a("packed_linear", FUSER) and node.attributes["role"] == "qkv" for node in users):
        return "norm A"
    if any(node.is_a("packed_linear", FUSER) for node in users):
        return "norm B"
    return "norm"


def traffic(launch: Launch) -> tuple[Dim, Dim, Dim]:
    """Bytes of parameters read, of activations read and written, and of keys and values read and written."""
    parameters: Dim = 0
    activations: Dim = 0
    cache: Dim = 0
    for value, size in launch.moved:
        if value.constant is not None or _is_stored(value):
            parameters = dims.add(parameters, size)
        elif _is_state(value):
            cache = dims.add(cache, size)
        else:
            activations = dims.add(activations, size)
    return parameters, activations, cache


def _is_stored(value: Value) -> bool:
    """Whether it is a constant in another order."""
    node = value.producer
    return node is not None and all(v is None or v.constant is not None for v in node.inputs)


def _is_state(value: Value) -> bool:
    """Whether it holds keys or values of all tokens."""
    node = value.producer
    return node is not None and node.domain == FUSER and node.op in WRITES - {"rotary"} and value in node.outputs[-2:]


def text(costs: Iterable[Cost], gpu: GPU, assumptions: Assumptions, *, batch: int, context: int) -> str:
    """A line a launch: amounts at a batch, FLOPs a byte, the side of the roofline, and the batch where it changes."""
    limit = ridge(gpu, assumptions)
    lines = [
        f"{gpu.name}: {limit:.0f} FLOP a byte; batch {batch}, context {context}",
        f"{'':>19} {'times':>5} {'FLOP':>9} {'parameters':>11} {'activations':>11} {'cache':>9} {'FLOP/B':>7}  "
        f"{'bound by':<8} compute from",
    ]
    for cost in costs:
        found = cost.at(batch=batch, past=context - 1)
        flops = amount(float(found.flops))
        moved = [amount(float(one)) + "B" for one in (found.parameters, found.activations, found.cache)]
        bound = "compute" if cost.is_compute_bound(gpu, assumptions, batch=batch, past=context - 1) else "memory"
        start = cost.crossover(gpu, assumptions, past=context - 1)
        since = "never" if start is None else f"batch {start:.0f}"
        lines.append(
            f"{cost.name:>19} {cost.count:5} {flops:>9} {moved[0]:>11} {moved[1]:>11} {moved[2]:>9} "
            f"{float(found.intensity):7.1f}  {bound:<8} {since}"
        )
    return "\n".join(lines)


def formulas(costs: Iterable[Cost]) -> list[dict[str, Any]]:
    """JSON-ready: amounts as expressions in batch, sequence and past."""
    return [
        {
            "name": cost.name, "count": cost.count, "module": cost.launch.origin.module, "flops": str(cost.flops),
            "parameter_bytes": str(cost.parameters), "activation_bytes": str(cost.activations), "cache_bytes": str(cost.cache),
        }
        for cost in costs
    ]  # fmt: skip


def workload_of(path: Path, *, note: Progress | None = None) -> Workload:
    """What a file's or a folder's model asks for, by its fused graph.

    Raises:
        InputError: it cannot be read, or is no decoder that keeps keys and values.
    """
    made = graph_of(path, note=note)
    try:
        costs = analyze(made.graph)
    except UnsupportedOperator as error:
        raise InputError(f"'{path}' is no decoder that can be planned: {error}") from None
    states = [v.shape for v in made.graph.inputs if v.shape is not None and len(v.shape) == 4]
    if not states or not all(isinstance(states[0][axis], int) for axis in (1, 3)):
        raise InputError(
            f"'{path}' is no decoder that can be planned: it keeps no keys and values [batch, heads, past, width]"
        )
    kv_heads, head_dim = int(states[0][1]), int(states[0][3])
    tables = {leaf for cost in costs if cost.launch.family == "gather" for leaf in _leaves(cost.launch)}
    tied = {leaf for cost in costs if cost.launch.family == "linear" for leaf in _leaves(cost.launch)} & tables
    operators = [_operator(cost, tied) for cost in costs]
    live = max((op.split + op.whole for op in operators), default=0)
    return Workload(str(path), tuple(operators), kv_heads, head_dim, live)


def _stored(value: Value) -> Constant | None:
    """The constant that a value is, perhaps in another order."""
    if value.constant is None and value.producer is not None and _is_stored(value):
        value = value.producer.inputs[0] or value
    return value.constant


def _leaves(launch: Launch) -> set[int]:
    """What identifies the matrices that a launch reads."""
    held = [constant for value in launch.inputs if (constant := _stored(value)) is not None]
    return {id(leaf) for constant in held if len(constant.shape) == 2 for leaf in constant.leaves()}


def _operator(cost: Cost, tied: set[int]) -> Operator:
    """A launch as an operator: amounts of one token, and of one key. Of `tied` matrices the table alone counts."""
    one, two = (cost.at(past=past) for past in (0, 1))
    per_key = int(two.flops) - int(one.flops)
    launch, main = cost.launch, _main(cost.launch)
    is_table = launch.family == "gather"
    weights: dict[str, int] = {}
    vectors = read = written = 0
    for value in launch.inputs:
        stored = _stored(value)
        if stored is None:
            read += 0 if _is_state(value) else _per_token(value)
        elif len(stored.shape) == 2:
            if is_table or tied.isdisjoint(map(id, stored.leaves())):
                weights |= _named(cost.name, main, stored.size)
        else:
            vectors += stored.size
    written = sum(_per_token(value) for value in launch.outputs if not _is_state(value))
    is_divided = cost.name in ("o", "feed-forward B")
    is_linear = launch.family == "linear"
    parted = cost.name in ("qkv", "feed-forward A", "head")
    split = read + written if main.op == "attention" else (read if is_divided else written if parted else 0)
    element = max(1, (main.output.dtype.bits if main.output.dtype is not None else 8) // 8)
    attends = main.op == "attention"
    return Operator(
        cost.name,
        cost.count,
        weights,
        vectors,
        is_quantizable=is_linear and cost.name != "head",
        is_table=is_table and tied.isdisjoint(_leaves(launch)),
        macs=(int(one.flops) - per_key) // 2 if is_linear else 0,
        macs_per_key=per_key // 2 if attends else 0,
        whole=read + written - split,
        split=split,
        kv=(int(two.cache) - int(one.cache)) // element if attends else 0,
        reduced=written if is_divided else 0,
    )


def _named(name: str, main: Node, size: int) -> dict[str, int]:
    """Elements by group: those of a packed projection apart."""
    if name == "qkv" and main.is_a("packed_linear", FUSER):
        parts: Sequence[int] = main.attributes["sizes"]
        return {group: size * part // sum(parts) for group, part in zip("qkv", parts, strict=True)}
    return {name: size}


def _per_token(value: Value) -> int:
    """Elements of a value for one token."""
    known: dict[sympy.Symbol, Dim] = dict.fromkeys(dims.symbols(value.shape or ()), 1)
    size = dims.product(dims.substitute(dim, known) for dim in value.shape or ())
    return size if isinstance(size, int) and value.dtype is not None and value.dtype.is_float else 0
