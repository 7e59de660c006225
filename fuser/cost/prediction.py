"""How long a step takes on a GPU, before it runs: of each launch its bytes or its arithmetic, whichever is longer, and a ramp.

What is counted are the launches of the program that generating runs, with what tables do not hold left out: cosines, page
tables. Ceilings are those measured of the card, else shares of its datasheet; none is fitted to a step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fuser.codegen.attention import Attention
from fuser.codegen.compose import compose
from fuser.codegen.elementwise import Elementwise
from fuser.codegen.embedding import Embedding
from fuser.codegen.kernel import DTYPES
from fuser.codegen.kv_groups import group_of, kv_group_of
from fuser.codegen.linear import Linear
from fuser.codegen.matmul import Matmul
from fuser.codegen.plan import repeated
from fuser.codegen.program import Argument, Cached, Part, Program, Rows, Scratch, Step, Weight
from fuser.codegen.quantized import Dequantize
from fuser.codegen.rotary import Rotary
from fuser.codegen.rounding import Rounding
from fuser.cost.gpus import GPU
from fuser.cost.modules import Made
from fuser.cost.planning import OURS, Assumptions
from fuser.errors import UsageError

AROUND = 8  # launches of a step that are not of the model: tokens put in place, the likeliest chosen


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reaches: bytes a second, operations a second by the type of products, seconds of an empty launch.

    codes: weights a second that kernels of few tokens undo, by kind; what is not there costs its bytes alone. int8_cache: bytes
    a second of attention over int8 pages.
    """

    bytes: float
    operations: dict[str | None, float]
    launch_s: float
    codes: dict[str, float]
    int8_cache: float
    source: str

    @classmethod
    def of(cls, gpu: GPU, assumptions: Assumptions = OURS) -> "Ceilings":
        """Those measured of a card, or else shares of its datasheet."""
        found = gpu.measured
        if found is None:
            rate = gpu.bandwidth_gb_s * 1e9 * assumptions.bandwidth
            operations = {kind: gpu.rate(kind) * 1e12 * assumptions.compute for kind in (None, "int8", "fp8")}
            return cls(rate, operations, 2e-6, {}, rate, "shares of the datasheet")
        rates = {None: found.tflops, "int8": found.int8_tops, "fp8": found.fp8_tflops}
        operations = {kind: (rate or found.tflops) * 1e12 for kind, rate in rates.items()}
        codes = {"int4": found.int4_codes, "nf4": found.nf4_codes, "int8": found.int8_codes}
        rate = found.copy_gb_s * 1e9
        return cls(
            rate,
            operations,
            found.launch_us * 1e-6,
            {kind: each * 1e12 for kind, each in codes.items() if each},
            found.int8_cache_gb_s * 1e9 if found.int8_cache_gb_s else rate,
            "measured",
        )


@dataclass(frozen=True)
class StepCost:
    """What a launch of a program asks for.

    Attributes:
        name: what it is for: qkv, o, feed-forward A, ..., and what else it computes.
        count: how many layers have it.
        parameters, activations, cache: bytes.
        flops: a multiply-add is two; products: of what type they are.
        codes: weights that it undoes, of `format`.
    """

    name: str
    count: int
    parameters: float
    activations: float
    cache: float
    flops: float
    products: str | None = None
    codes: int = 0
    format: str = ""
    is_int8_cache: bool = False

    @property
    def bytes(self) -> float:
        return self.parameters + self.activations + self.cache

    def seconds(self, ceilings: Ceilings) -> float:
        """Of one launch. Undoing codes and multiplying are done by the same threads, and add up."""
        moved = (self.parameters + self.activations) / ceilings.bytes
        moved += self.cache / (ceilings.int8_cache if self.is_int8_cache else ceilings.bytes)
        done = self.flops / ceilings.operations[self.products]
        if self.codes and self.format in ceilings.codes:
            done += self.codes / ceilings.codes[self.format]
        return ceilings.launch_s + max(moved, done)


@dataclass(frozen=True)
class Prediction:
    """A step of `batch` sequences of `context` tokens on a GPU."""

    gpu: str
    batch: int
    context: int
    steps: tuple[StepCost, ...]
    ceilings: Ceilings

    @property
    def seconds(self) -> float:
        return sum(s.count * s.seconds(self.ceilings) for s in self.steps) + AROUND * self.ceilings.launch_s

    @property
    def bytes(self) -> float:
        return sum(s.count * s.bytes for s in self.steps)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; bytes and seconds."""
        steps = [{**asdict(s), "bytes": s.bytes, "seconds": s.seconds(self.ceilings)} for s in self.steps]
        return {"gpu": self.gpu, "batch": self.batch, "context": self.context, "seconds": self.seconds, "steps": steps}


def predict(
    made: Made, gpu: GPU, *, batch: int, context: int = 512, dtype: str = "bf16", kv: str = "auto",
    assumptions: Assumptions = OURS,
) -> Prediction:  # fmt: skip
    """How long a decode step takes.

    Args:
        made: a fused graph, its weights quantized or not, of `fuser.cost.modules`.
        batch: sequences, a new token each.
        context: tokens of each, the new one included.
        kv: the element type of keys and values: auto (`dtype`), int8, int8:GROUP.

    Raises:
        UsageError: a number, dtype or kind of cache that cannot be.
        UnsupportedOperator: a node that no step over pages computes.
    """
    if batch < 1 or context < 1:
        raise UsageError(f"a step has at least one sequence and one token, not {batch} of {context}")
    program = compose(made.graph, dtype=dtype, tokens=batch, decode=True, kv_group=kv_group_of(kv, dtype))
    return Prediction(
        gpu.name, batch, context, tuple(costs(program, made, batch, context)), Ceilings.of(gpu, assumptions)
    )


def costs(program: Program, made: Made, batch: int, context: int) -> list[StepCost]:
    """What each launch of a program asks for, repeated layers once; those that stand for a shape's with its count."""
    found = [
        _cost(program, step, name, batch, context) for step, name in zip(program.steps, names(program), strict=True)
    ]
    folded: list[StepCost] = []
    for count, run in repeated(found, found):
        layers = made.layers if count == made.made_layers and len(run) > 1 else count
        folded += [StepCost(**{**vars(one), "count": layers}) for one in run]
    return folded


def _cost(program: Program, step: Step, name: str, n: int, context: int) -> StepCost:
    size = DTYPES[program.dtype]
    parameters = activations = cache = 0.0
    codes, products, flops, format = 0, None, 0.0, ""
    for argument in step.arguments:
        if isinstance(argument, Weight):
            parameters += _weight_bytes(argument, size, n)
        elif isinstance(argument, (Rows, Part)):
            rows = argument.rows if isinstance(argument, Part) else argument
            activations += n * argument.width * DTYPES[rows.dtype or program.dtype]
        elif isinstance(argument, Scratch):
            activations += argument.N * argument.K * size
        elif isinstance(argument, Cached):
            seen = min(context, argument.state.window or context) if isinstance(step.what, Attention) else 1
            cache += n * seen * _channel_bytes(argument, program.kv_group, size)
    what = step.what
    if isinstance(what, Linear):
        flops = 2.0 * n * what.N * what.K
        if what.format is not None:
            products = what.format.activations
            codes, format = (0, "") if products else (what.N * what.K, what.format.kind)
    elif isinstance(what, Attention):
        flops = 4.0 * n * min(context, what.window or context) * what.heads * what.head_dim
    elif step.kind == "product" or isinstance(what, Matmul):
        flops = sum(2.0 * n * _elements(a) for a in step.arguments[1:2])
    return StepCost(
        name, 1, parameters, activations, cache, flops, products, codes, format,
        is_int8_cache=isinstance(what, Attention) and bool(what.kv_group),
    )  # fmt: skip


def _elements(argument: Argument) -> int:
    """Of a product's weight."""
    if isinstance(argument, Scratch):
        return argument.N * argument.K
    return argument.base.size if isinstance(argument, Weight) and argument.base is not None else 0


def _weight_bytes(weight: Weight, size: int, n: int) -> float:
    base, what = weight.base, weight.product
    if weight.kind in ("cos", "sin"):
        return 4.0 * n * (base.size if base is not None else 0)
    if base is None:
        return 0.0
    if weight.kind == "table":
        return float(n * base.shape[-1] * size)
    if weight.kind in ("codes", "scales", "zeros") and what is not None and what.format is not None:
        if weight.kind == "codes":
            return float(what.N * what.format.packed(what.K))
        return 2.0 * what.N * what.format.groups(what.K)
    if weight.kind == "eights":
        return float(base.size)
    if weight.kind in ("row_scales", "column_sums"):
        return 4.0 * base.shape[-1]
    return float(base.size * size)


def _channel_bytes(argument: Cached, kv_group: int, size: int) -> float:
    """Bytes of a token's keys, or values, or scales of them, in one layer."""
    state = argument.state
    if argument.which.endswith("scale"):
        return 2.0 * state.kv_heads * state.head_dim / group_of(kv_group, state.head_dim)
    return float(state.kv_heads * state.head_dim * (1 if kv_group else size))


def names(program: Program) -> list[str]:
    """What each launch is for: products by where they stand between one attention and the next."""
    attended = [i for i, step in enumerate(program.steps) if isinstance(step.what, Attention)]
    products = [i for i, step in enumerate(program.steps) if _is_product(step)]
    roles: dict[int, str] = {}
    for place, start in enumerate(attended):
        stop = attended[place + 1] if place + 1 < len(attended) else len(program.steps)
        within = [i for i in products if start < i < stop]
        last = ["head"] if stop == len(program.steps) else ["qkv"]
        between = ["o", *["feed-forward A"] * max(len(within) - 3, 0), "feed-forward B"]
        roles |= zip(within, [*between[: len(within) - 1], *last], strict=False)
    roles |= dict.fromkeys([i for i in products if not attended or i < attended[0]], "qkv")
    return [_name(step, roles.get(i, "")) for i, step in enumerate(program.steps)]


def _is_product(step: Step) -> bool:
    return step.kind == "product" or isinstance(step.what, (Linear, Matmul))


def _name(step: Step, role: str) -> str:
    what = step.what
    if isinstance(what, Linear):
        more = [what.rotary is not None and "rotary, cache write", what.pairs and "gate", what.residual and "residual"]
        before = "norm, " if what.norm else ""
        return before + ", ".join([role, *(part for part in more if part)])
    if _is_product(step):
        return role + (", residual" if len(step.arguments) > 3 else "")
    if isinstance(what, Elementwise):
        return "norm" if len([a for a in step.arguments if isinstance(a, (Rows, Part))]) == 2 else "gate"
    kinds: dict[type, str] = {
        Attention: "attention", Rotary: "rotary, cache write", Rounding: "norm, rounding", Embedding: "embedding",
        Dequantize: "codes undone",
    }  # fmt: skip
    return kinds.get(type(what)) or ", ".join(node.op for node in step.nodes) or type(what).__name__.lower()


def text(found: Prediction) -> str:
    """A line a launch."""
    total = found.seconds
    lines = [
        f"{found.gpu}, batch {found.batch}, context {found.context}: {total * 1e3:.2f} ms a step, {found.bytes / 1e9:.2f} GB "
        f"(ceilings {found.ceilings.source})",
        f"{'':>34} {'times':>5} {'us':>8} {'share':>6} {'MB':>9} {'GFLOP':>8} {'FLOP/B':>7}",
    ]
    for step in found.steps:
        took = step.seconds(found.ceilings)
        lines.append(
            f"{step.name:>34} {step.count:5} {took * 1e6:8.1f} {step.count * took / total:6.1%} {step.bytes / 1e6:9.2f} "
            f"{step.flops / 1e9:8.2f} {step.flops / max(step.bytes, 1):7.1f}"
        )
    return "\n".join(lines)


def stops_paying(gpu: GPU, format_bits: float, kind: str, assumptions: Assumptions = OURS) -> tuple[float, float]:
    """Batches, of a product of weights alone: from which on its codes are bound by arithmetic, and save no time any more.

    A weight in 16 bits takes max(2 bytes, 2 FLOP x batch); in codes max(their bytes, undoing them + 2 FLOP x batch).
    """
    ceilings = Ceilings.of(gpu, assumptions)
    done, undone = 2 / ceilings.operations[None], 1 / ceilings.codes[kind] if kind in ceilings.codes else 0.0
    whole, small = 2 / ceilings.bytes, format_bits / 8 / ceilings.bytes
    return max((small - undone) / done, 0.0), max((whole - undone) / done, 0.0)


def compared(
    made: Made, gpu: GPU, measured: Sequence[tuple[int, float]], **how: Any
) -> list[tuple[int, float, float, float]]:
    """(batch, measured ms, predicted ms, relative error) of measured steps."""
    rows = []
    for batch, took_ms in measured:
        predicted = predict(made, gpu, batch=batch, **how).seconds * 1e3
        rows.append((batch, took_ms, predicted, predicted / took_ms - 1))
    return rows


def compared_text(rows: Iterable[tuple[int, float, float, float]]) -> str:
    """The same as a table."""
    lines = [f"{'sequences':>9} {'measured ms':>12} {'predicted ms':>13} {'error':>7}"]
    lines += [f"{batch:9} {took:12.2f} {predicted:13.2f} {error:+7.1%}" for batch, took, predicted, error in rows]
    return "\n".join(lines)
