"""The memory plan and the limits of a decode step on a GPU, on paper: what fits, and how long its bytes and products take.

A step takes max(compute, memory) + communication, unless something else is assumed. All that is assumed is in `Assumptions`,
and printed with every result.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fuser.cost.gpus import GB, GPU
from fuser.cost.workload import Operator, Workload
from fuser.errors import UsageError
from fuser.formats import Format, format_of

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
KV_GROUP = 64  # channels that share a scale in a cache of int8
SCALE_BYTES = 2


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted.

    Attributes:
        bandwidth, compute, link: the share of a datasheet's rate that is reached.
        memory: the share of a card's memory that weights and cache may take.
        binary: whether GB/s are taken for 2^30 bytes a second, and TFLOPS for 2^40.
        scales: whether codes of weights and caches have their scales counted.
        held: what a sequence takes in memory: its `cache` and what a step holds of it at once, or all its `traffic`.
        key_weight: how many times the multiply-adds of attention are counted.
        read_factor, held_factor: what a step reads of a sequence, and what memory it takes, as multiples of its cache; None:
            the cache and its activations, as above.
        is_ring: whether each card of n sends 2 (n - 1) / n of what is added up, as a ring does; else twice.
        is_compute_counted: whether a step waits for its arithmetic; else for memory and communication alone.
        is_shared: whether all cards share what one PCI Express slot can do.
        all_reduce_us: what adding up takes beside its bytes.
    """

    bandwidth: float = 0.8
    compute: float = 0.4
    link: float = 0.8
    memory: float = 1.0
    binary: bool = False
    scales: bool = True
    held: str = "cache"
    key_weight: float = 1.0
    read_factor: float | None = None
    held_factor: float | None = None
    is_ring: bool = True
    is_shared: bool = False
    is_compute_counted: bool = True
    all_reduce_us: float = 10.0

    def text(self) -> str:
        """What is assumed, in a few lines."""
        units = "2^30 bytes and 2^40 operations" if self.binary else "1e9 bytes and 1e12 operations"
        sent = "2 (n - 1) / n of a row" if self.is_ring else "two rows"
        lines = [
            f"bandwidth {self.bandwidth:.0%}, compute {self.compute:.0%}, memory {self.memory:.0%}, link {self.link:.0%} "
            f"of the datasheet; GB/s and TFLOPS of {units}, memory of 2^30 bytes",
            f"a sequence holds its {'cache and its live activations' if self.held == 'cache' else 'cache and all traffic'}; "
            f"scales of codes {'counted' if self.scales else 'not counted'}",
            f"all-reduce: a card sends {sent} and receives as much"
            + (", all cards share one slot of PCI Express" if self.is_shared else "")
            + f", and {self.all_reduce_us:g} us; step = {'max(compute, memory)' if self.is_compute_counted else 'memory'} "
            "+ communication",
        ]
        if self.key_weight != 1:
            lines.append(f"multiply-adds of attention counted {self.key_weight:g} times")
        if self.read_factor is not None or self.held_factor is not None:
            lines.append(f"a sequence is read {self.read_factor:g} and held {self.held_factor:g} times its cache")
        return "\n".join(lines)


OURS = Assumptions()
# Those of a published talk on LLM inference, as its figures imply: docs/cost.md derives them.
TALK = Assumptions(
    link=1.0,
    binary=True,
    scales=False,
    held="traffic",
    key_weight=8,
    is_ring=False,
    is_shared=True,
    is_compute_counted=False,
    all_reduce_us=0,
)
KNOWN = {"ours": OURS, "talk": TALK}


@dataclass(frozen=True)
class Plan:
    """A decode step of `batch` sequences of `seqlen` tokens on `cards` GPUs.

    Attributes:
        weights_bytes: by group, of the whole model.
        card_weights_bytes: of one card; read_weights_bytes: those that a step reads.
        cache_bytes: keys and values of a sequence, of the whole model; sequence_bytes: what it takes of one card's memory.
        capacity: how many sequences fit, with a fraction; negative where the weights alone do not.
        batch: those that are planned for; where none were asked for, all that fit.
        compute_s, memory_s, communication_s: what the step's arithmetic, bytes and sums over cards take.
    """

    model: str
    gpu: GPU
    cards: int
    seqlen: int
    dtype: str
    weights: str
    kv: str
    weights_bytes: Mapping[str, int]
    card_weights_bytes: float
    read_weights_bytes: float
    cache_bytes: float
    sequence_bytes: float
    capacity: float
    batch: float
    compute_s: float
    memory_s: float
    communication_s: float
    assumptions: Assumptions = field(repr=False, default=OURS)

    @property
    def fits(self) -> bool:
        return 0 < self.batch <= self.capacity

    @property
    def step_s(self) -> float:
        compute_s = self.compute_s if self.assumptions.is_compute_counted else 0.0
        return max(compute_s, self.memory_s) + self.communication_s

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s if self.batch > 0 else 0.0

    @property
    def bound(self) -> str:
        """What takes the longest: compute, memory or communication."""
        parts = {"compute": self.compute_s, "memory": self.memory_s, "communication": self.communication_s}
        return max(parts, key=lambda name: parts[name])

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; bytes and seconds."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("gpu", "assumptions")}
        said = {name: getattr(self, name) for name in ("fits", "step_s", "tokens_per_s", "bound")}
        return {**own, "gpu": self.gpu.name, **said, "assumptions": asdict(self.assumptions)}


def code_bytes(elements: int, format: Format | None, dtype: str, assumptions: Assumptions) -> float:
    """Bytes of a product's weights: numbers, or codes with their scales (of rows that are much longer than a group)."""
    if format is None:
        return elements * DTYPE_BYTES[dtype]
    scale = SCALE_BYTES / format.group if format.group and assumptions.scales else 0.0
    return elements * (format.bits / 8 + scale * (1 if format.symmetric else 2))


def kv_bytes(elements: int, kv: str, dtype: str, assumptions: Assumptions) -> float:
    """Bytes of keys and values.

    Raises:
        UsageError: there is no cache of that kind.
    """
    if kv in ("auto", dtype):
        return elements * DTYPE_BYTES[dtype]
    kind, _, group = kv.partition(":")
    if kind != "int8" or (group and group not in ("32", "64", "128")):
        raise UsageError(f"a cache is auto, {dtype}, int8, int8:32, int8:64 or int8:128, not {kv!r}")
    return elements * (1 + (SCALE_BYTES / int(group or KV_GROUP) if assumptions.scales else 0.0))


def plan_on(
    workload: Workload, gpu: GPU, *, quantize: str | Format | None = None, kv: str = "auto", dtype: str = "fp16", tp: int = 1,
    seqlen: int = 512, batch: int | None = None, assumptions: Assumptions = OURS,
) -> Plan:  # fmt: skip
    """The plan of a model on one kind of GPU.

    Args:
        quantize: a format for the weights of products but the one that makes logits, as of `fuser.quantize`.
        kv: the element type of keys and values: auto (`dtype`), int8, int8:GROUP.
        tp: cards that share each layer (tensor parallelism): each has its part of the weights and heads, and what they made is
            added up twice a layer.
        seqlen: tokens that each sequence has.
        batch: sequences; by default as many as fit.

    Raises:
        UsageError: a number or a name is not one that can be.
    """
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"a dtype is {', '.join(DTYPE_BYTES)}, not {dtype!r}")
    for name, value in (("tp", tp), ("seqlen", seqlen), ("batch", 1 if batch is None else batch)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    format = format_of(quantize) if quantize is not None else None
    size, ours = DTYPE_BYTES[dtype], assumptions
    giga, tera = (1 << 30, 1 << 40) if ours.binary else (10**9, 10**12)

    def bytes_of(op: Operator) -> float:
        return code_bytes(op.parameters, format if op.is_quantizable else None, dtype, ours)

    vectors = sum(op.count * op.vectors for op in workload.operators) * size
    held = sum(op.count * bytes_of(op) for op in workload.operators) / tp + vectors
    read = sum(op.count * bytes_of(op) for op in workload.operators if not op.is_table) / tp + vectors

    cache = kv_bytes(workload.kv, kv, dtype, ours) * seqlen
    own_cache = cache / min(tp, workload.kv_heads or tp)  # a card has one head at least
    activations = sum(op.count * (op.whole + op.split / tp) for op in workload.operators) * size
    traffic = own_cache * ours.read_factor if ours.read_factor is not None else own_cache + activations
    if ours.held_factor is not None:
        sequence = own_cache * ours.held_factor
    else:
        sequence = traffic if ours.held == "traffic" else own_cache + workload.live * size
    capacity = (gpu.memory_gb * GB * ours.memory - held) / sequence if sequence else 0.0
    fitting = max(capacity, 0.0) if ours.held == "traffic" else max(math.floor(capacity), 0)
    planned: float = fitting if batch is None else batch

    eights = format.activations if format is not None else None
    macs: dict[str | None, float] = {None: 0.0, eights: 0.0}
    for op in workload.operators:
        macs[eights if op.is_quantizable else None] += op.count * op.macs
        macs[None] += op.count * op.macs_per_key * seqlen * ours.key_weight
    compute = sum(2 * n * planned / tp / (gpu.rate(kind) * tera * ours.compute) for kind, n in macs.items())
    memory = (read + planned * traffic) / (gpu.bandwidth_gb_s * giga * ours.bandwidth)
    return Plan(
        workload.name, gpu, tp, seqlen, dtype, str(format) if format is not None else dtype, dtype if kv == "auto" else kv,
        groups(workload, format, dtype, ours), held, read, cache, sequence, capacity, planned, compute, memory,
        communication(workload, gpu, planned, tp, size, ours), ours,
    )  # fmt: skip


def communication(workload: Workload, gpu: GPU, batch: float, tp: int, size: int, assumptions: Assumptions) -> float:
    """Seconds of adding up what the cards made: a ring's volume over the link, both directions at once."""
    if tp == 1:
        return 0.0
    reduced = sum(op.count * op.reduced for op in workload.operators) * batch * size
    times = sum(op.count for op in workload.operators if op.reduced)
    passes = 2 * (tp - 1) / tp if assumptions.is_ring else 2.0
    rate = gpu.link_gb_s * (1 << 30 if assumptions.binary else 10**9) * assumptions.link
    if assumptions.is_shared and gpu.link == "PCIe":
        rate /= tp
    return 2 * passes * reduced / rate + times * assumptions.all_reduce_us * 1e-6


def groups(workload: Workload, format: Format | None, dtype: str, assumptions: Assumptions) -> dict[str, int]:
    """Bytes of weights by group, the same weights of all layers together; norms and biases are one group."""
    found: dict[str, float] = {}
    for op in workload.operators:
        for name, elements in op.weights.items():
            size = code_bytes(elements, format if op.is_quantizable else None, dtype, assumptions)
            found[name] = found.get(name, 0.0) + op.count * size
    vectors = sum(op.count * op.vectors for op in workload.operators) * DTYPE_BYTES[dtype]
    return {name: round(size) for name, size in {**found, **({"norms, biases": vectors} if vectors else {})}.items()}


def cache_text(workload: Workload, kv: str, dtype: str, seqlens: Iterable[int], assumptions: Assumptions) -> str:
    """GB of keys and values by length and number of sequences."""
    batches = (1, 2, 4, 8, 16, 32)
    unit, giga = _unit(kv_bytes(workload.kv, kv, dtype, assumptions) * 512)
    lines = [f"{f'cache, {unit}':>16} " + "".join(f"{batch:>9}" for batch in batches) + "  sequences"]
    for seqlen in seqlens:
        one = kv_bytes(workload.kv, kv, dtype, assumptions) * seqlen / giga
        lines.append(f"{seqlen:>9} tokens " + "".join(f"{one * batch:9.2f}" for batch in batches))
    return "\n".join(lines)


def weights_text(plan: Plan) -> str:
    """Weights by group."""
    total = sum(plan.weights_bytes.values())
    unit, giga = _unit(total)
    parts = [f"{name} {size / giga:.2f}" for name, size in plan.weights_bytes.items()]
    each = f"; {plan.card_weights_bytes / giga:.2f} a card" if plan.cards > 1 else ""
    return f"weights, {unit}: {', '.join(parts)}; sum {total / giga:.2f}{each}"


def _unit(size: float) -> tuple[str, int]:
    """In what a size is told, and how many bytes that is: as memory is sold."""
    return ("MB", GB >> 10) if size < GB / 100 else ("GB", GB)


def plans_text(plans: Iterable[Plan]) -> str:
    """A line a GPU."""
    made = list(plans)
    header = (
        f"{'GPU':>10} {'GB':>5} {'GB/s':>7} {'TFLOPS':>7} {'batch':>6} {'tokens/s':>9} {'compute ms':>11} {'memory ms':>10} "
        f"{'comm. ms':>9}  bound by"
    )
    lines = [header]
    for plan in made:
        gpu = plan.gpu
        line = f"{gpu.name:>10} {gpu.memory_gb:5g} {gpu.bandwidth_gb_s:7g} {gpu.tflops:7g} {plan.batch:6.0f} "
        if not plan.fits:
            needed = (plan.card_weights_bytes + max(plan.batch, 1) * plan.sequence_bytes) / GB
            lines.append(line + f"does not fit: a card needs {needed:.1f} GB")
            continue
        line += f"{plan.tokens_per_s:9.1f} {plan.compute_s * 1e3:11.1f} {plan.memory_s * 1e3:10.2f} "
        lines.append(line + f"{plan.communication_s * 1e3:9.2f}  {plan.bound}")
    return "\n".join(lines)


def operators_text(workload: Workload, seqlen: int, dtype: str, assumptions: Assumptions) -> str:
    """What each operator asks for, all layers together: of a token, at a length; GB and 2^40 as of `Assumptions`."""
    lines = [f"{'':>16} {'compute':>10} {'parameters, GB':>15} {'activations, GB':>16} {'cache, GB':>10}"]
    size, total = DTYPE_BYTES[dtype], [0.0] * 4
    for op in workload.operators:
        amounts = [
            op.count * (op.macs + op.macs_per_key * seqlen * assumptions.key_weight) / 2**40,
            0 if op.is_table else op.count * op.parameters * size / GB,
            op.count * (op.whole + op.split) * size / GB,
            op.count * op.kv * seqlen * size / GB,
        ]
        total = [a + b for a, b in zip(total, amounts, strict=True)]
        lines.append(f"{op.name:>16} " + _amounts(amounts))
    return "\n".join([*lines, f"{'sum':>16} " + _amounts(total)])


def _amounts(amounts: list[float]) -> str:
    return f"{amounts[0]:10.6f} {amounts[1]:15.2f} {amounts[2]:16.6f} {amounts[3]:10.4f}"
