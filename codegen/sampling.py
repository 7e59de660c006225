"""Choosing the next token on the device: the highest logits of a row, and a draw among them.

A logit and its index are one whole number whose order is that of the logits, the lower index first among equals, so that
choices repeat exactly; NaN comes last.
"""

from dataclasses import dataclass

from fuser.codegen.kernel import Emitter, Kernel, element, power_of_two
from fuser.errors import UsageError

MOST = 256  # candidates
TOGETHER = 2048  # candidates of parts that are combined in one step

KEYS = '''
@triton.jit
def as_keys(x, index):
    """Whole numbers in the order of x, of equal ones in the order of falling index; NaN lowest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # the zeros are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(x == x, ordered, -0x7FFFFFFF - 1)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def value_of(keys):
    """The x of keys."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(keys):
    """The index of keys."""
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF).to(tl.int32)
'''
NOISE = '''
@triton.jit
def gumbel(seed, index):
    """Gumbel noise: the index of the highest of logits + noise is drawn with the probabilities of their softmax."""
    u = tl.rand(seed, index)
    return -tl.log(-tl.log(tl.maximum(u, 1e-10)))
'''


@dataclass(frozen=True)
class Top:
    """The `k` highest of V logits / temperature in every row, falling, and the logarithm of the sum of all their exponentials.

    With `noise` each logit has Gumbel noise added before it is compared, so that k = 1 draws from all of the vocabulary.
    """

    V: int
    k: int = 1
    noise: bool = False
    dtype: str = "bf16"


def top(what: Top, *, BLOCK: int | None = None, num_warps: int = 8) -> Kernel:
    """The kernel of `what`.

    launch(logits, temperature, [seeds,] values, indices, normalizer, partial, arrived): logits [rows, V] of `dtype`,
    temperature [rows] float32 (0: as 1), seeds [rows] int32; values [rows, k] float32, without the noise, indices [rows, k]
    int32, normalizer [rows] float32. The workspace is for one row.

    Raises:
        UsageError: more candidates than there are logits, or than the kernel can hold.
    """
    if not 1 <= what.k <= min(MOST, what.V):
        raise UsageError(f"codegen: 1 to {min(MOST, what.V)} candidates are taken, not {what.k}")
    K = power_of_two(what.k)
    BLOCK = max(BLOCK or min(4096 if K == 1 else 2048, power_of_two(what.V)), K)
    parts = -(-what.V // BLOCK)
    together = power_of_two(min(parts, max(TOGETHER // K, 1)))
    e = Emitter(
        "top",
        f"The {what.k} highest of {what.V} logits, falling, and the logarithm of the sum of their exponentials.",
        (
            f"Grid: (rows, {parts} parts of the vocabulary). One program takes {BLOCK} logits of one row.",
            "The last part of a row to arrive combines them all, in their order. In float32.",
        ),
        {"num_warps": num_warps, "num_stages": 1},
    )
    tensors = [
        "logits",
        "temperature",
        *["seeds"] * what.noise,
        "values",
        "indices",
        "normalizer",
        "partial",
        "arrived",
    ]
    for name in tensors:
        integer = name in ("seeds", "indices", "arrived")
        e.pointer(name, "i32" if integer else element(what.dtype) if name == "logits" else "fp32")
    e.constant(V=what.V, TOP=what.k, BLOCK=BLOCK, BLOCK_K=K, PARTS=parts, BLOCK_P=power_of_two(parts), BLOCK_C=together)
    e.part(KEYS)
    if what.noise:
        e.part(NOISE)
    stride = 2 * K + 2
    e.begin(waits=True)
    e.add(
        "row = tl.program_id(0).to(tl.int64)",
        "column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "inside = column < V",
        "heat = tl.load(temperature + row)",
        "heat = tl.where(heat > 0.0, heat, 1.0)",
        'x = tl.load(logits + row * V + column, mask=inside, other=float("-inf")).to(tl.float32) / heat',
        "# This part's highest, and the sum of exponentials.",
        "highest = tl.max(x, 0)",
        'safe = tl.where(highest > float("-inf"), highest, 0.0)',
        "total = tl.sum(tl.exp(x - safe), 0)",
    )
    if what.noise:
        e.add("x += gumbel(tl.load(seeds + row), column)")
    e.add("keys = tl.where(inside, as_keys(x, column), -0x7FFFFFFFFFFFFFFF)")
    if K == 1:
        e.add("best = tl.max(keys, 0) + tl.zeros([1], tl.int64)")
    else:
        e.add("best = tl.topk(keys, BLOCK_K)")
    e.add(
        "c = tl.arange(0, BLOCK_K)",
        f"own = partial + (row * PARTS + tl.program_id(1)) * {stride}",
        "tl.store(own + c, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True))",
        "tl.store(own + BLOCK_K + c, (best & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True))",
        "tl.store(own + 2 * BLOCK_K, highest)",
        "tl.store(own + 2 * BLOCK_K + 1, total)",
        "tl.debug_barrier()  # the counter follows what all threads stored",
        'before = tl.atomic_add(arrived + row, 1, sem="acq_rel")',
    )
    with e.block("if before != PARTS - 1:"):
        e.add("return")
    e.add(
        "tl.debug_barrier()",
        "tl.store(arrived + row, 0)  # ready for the next launch",
        "p = tl.arange(0, BLOCK_P)",
        f"every = partial + (row * PARTS + p) * {stride} + 2 * BLOCK_K",
        'tops = tl.load(every, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")',
        'sums = tl.load(every + 1, mask=p < PARTS, other=0.0, cache_modifier=".cg")',
        "highest = tl.max(tops, 0)",
        'safe = tl.where(highest > float("-inf"), highest, 0.0)',
        "tl.store(normalizer + row, safe + tl.log(tl.sum(sums * tl.exp(tops - safe), 0)))",
        "best = tl.full([BLOCK_K], -0x7FFFFFFFFFFFFFFF, tl.int64)",
    )
    e.add("i = tl.arange(0, BLOCK_C * BLOCK_K)")
    with e.block("for part in range(0, PARTS, BLOCK_C):"):
        e.add(
            "their_part = part + i // BLOCK_K",
            "held = their_part < PARTS",
            f"other = partial + (row * PARTS + their_part) * {stride} + i % BLOCK_K",
            'high = tl.load(other, mask=held, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)',
            'low = tl.load(other + BLOCK_K, mask=held, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)',
            "theirs = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)",
            "theirs = tl.where(held, theirs, -0x7FFFFFFFFFFFFFFF)",
        )
        if K == 1:
            e.add("best = tl.maximum(best, tl.max(theirs, 0))")
        else:
            e.add("both = tl.join(best, tl.topk(theirs, BLOCK_K))")
            e.add("best = tl.topk(tl.reshape(both, [2 * BLOCK_K]), BLOCK_K)")
    e.add("index = index_of(best)", "taken = c < TOP")
    if what.noise:
        e.add("value = tl.load(logits + row * V + index, mask=taken, other=0.0).to(tl.float32) / heat")
    else:
        e.add("value = value_of(best)")
    e.add("tl.store(values + row * TOP + c, value, mask=taken)")
    e.add("tl.store(indices + row * TOP + c, index, mask=taken)")
    e.workspace = (parts * stride, 1)
    e.host += [
        f"def launch({', '.join(tensors)}, pdl=False):",
        '    """Fills values, indices and normalizer; all tensors are contiguous."""',
        "    rows = logits.shape[0]",
        "    if rows:",
        f"        {e.launched(f'(rows, {parts!r})', *tensors)}",
    ]
    return e.kernel()


def draw(k: int, *, num_warps: int = 1) -> Kernel:
    """A kernel that draws one of the `k` highest logits of every row, as `Top` gives them.

    launch(values, indices, normalizer, u, temperature, top_k, top_p, min_p, token, logprob): u, temperature, top_p, min_p
    [rows] float32, top_k [rows] int32 (0: all), u uniform in [0, 1); token [rows] int32, logprob [rows] float32, of all
    logits. Temperature 0 takes the highest. Kept are the first `top_k`; of their softmax the fewest that sum to `top_p`; of
    these, those of at least `min_p` times the highest probability (the order of Hugging Face's processors).

    Raises:
        UsageError: a number of candidates that the kernel cannot hold.
    """
    if not 1 <= k <= MOST:
        raise UsageError(f"codegen: 1 to {MOST} candidates are drawn from, not {k}")
    tensors = ["values", "indices", "normalizer", "u", "temperature", "top_k", "top_p", "min_p", "token", "logprob"]
    e = Emitter(
        "draw",
        f"One of {k} candidates of every row, drawn by top-k, top-p and min-p.",
        ("Grid: (rows,). One program draws for one row: its candidates in falling order. In float32.",),
        {"num_warps": num_warps, "num_stages": 1},
    )
    for name in tensors:
        e.pointer(name, "i32" if name in ("indices", "top_k", "token") else "fp32")
    e.constant(TOP=k, BLOCK_K=power_of_two(k))
    e.begin(waits=True)
    e.add(
        "row = tl.program_id(0).to(tl.int64)",
        "c = tl.arange(0, BLOCK_K)",
        'value = tl.load(values + row * TOP + c, mask=c < TOP, other=float("-inf"))',
        "most = tl.load(top_k + row)",
        "most = tl.where(most > 0, most, TOP)",
        "first = tl.max(value, 0)",
        "p = tl.where(c < most, tl.exp(value - first), 0.0)",
        "# All of the vocabulary is the softmax's sum where top-k leaves it in.",
        "whole = tl.exp(tl.load(normalizer + row) - first)",
        "p /= tl.where(tl.load(top_k + row) > 0, tl.sum(p, 0), whole)",
        "before = tl.cumsum(p, 0) - p",
        "kept = (before < tl.load(top_p + row)) & (p >= tl.load(min_p + row) * tl.max(p, 0)) & (p > 0.0)",
        "p = tl.where(kept | (c == 0), p, 0.0)",
        "sums = tl.cumsum(p, 0)",
        "place = tl.load(u + row) * tl.sum(p, 0)",
        "chosen = tl.min(tl.where((sums > place) & (p > 0.0), c, BLOCK_K), 0)",
        "chosen = tl.where((tl.load(temperature + row) > 0.0) & (chosen < BLOCK_K), chosen, 0)",
        "tl.store(token + row, tl.load(indices + row * TOP + chosen))",
        "tl.store(logprob + row, tl.load(values + row * TOP + chosen) - tl.load(normalizer + row))",
    )
    e.host += [
        f"def launch({', '.join(tensors)}, pdl=False):",
        '    """Fills token and logprob; all tensors are contiguous."""',
        "    rows = token.shape[0]",
        "    if rows:",
        f"        {e.launched('(rows,)', *tensors)}",
    ]
    return e.kernel()
