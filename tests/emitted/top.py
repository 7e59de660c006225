"""The 50 highest of 32000 logits, falling, and the logarithm of the sum of their exponentials.

Grid: (rows, 16 parts of the vocabulary). One program takes 2048 logits of one row.
The last part of a row to arrive combines them all, in their order. In float32.
"""

import triton
import triton.language as tl


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


@triton.jit
def kernel(
    logits,
    temperature,
    values,
    indices,
    normalizer,
    partial,
    arrived,
    V: tl.constexpr = 32000,
    TOP: tl.constexpr = 50,
    BLOCK: tl.constexpr = 2048,
    BLOCK_K: tl.constexpr = 64,
    PARTS: tl.constexpr = 16,
    BLOCK_P: tl.constexpr = 16,
    BLOCK_C: tl.constexpr = 16,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    heat = tl.load(temperature + row)
    heat = tl.where(heat > 0.0, heat, 1.0)
    x = tl.load(logits + row * V + column, mask=inside, other=float("-inf")).to(tl.float32) / heat
    # This part's highest, and the sum of exponentials.
    highest = tl.max(x, 0)
    safe = tl.where(highest > float("-inf"), highest, 0.0)
    total = tl.sum(tl.exp(x - safe), 0)
    keys = tl.where(inside, as_keys(x, column), -0x7FFFFFFFFFFFFFFF)
    best = tl.topk(keys, BLOCK_K)
    c = tl.arange(0, BLOCK_K)
    own = partial + (row * PARTS + tl.program_id(1)) * 130
    tl.store(own + c, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(own + BLOCK_K + c, (best & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(own + 2 * BLOCK_K, highest)
    tl.store(own + 2 * BLOCK_K + 1, total)
    tl.debug_barrier()  # the counter follows what all threads stored
    before = tl.atomic_add(arrived + row, 1, sem="acq_rel")
    if before != PARTS - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + row, 0)  # ready for the next launch
    p = tl.arange(0, BLOCK_P)
    every = partial + (row * PARTS + p) * 130 + 2 * BLOCK_K
    tops = tl.load(every, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(every + 1, mask=p < PARTS, other=0.0, cache_modifier=".cg")
    highest = tl.max(tops, 0)
    safe = tl.where(highest > float("-inf"), highest, 0.0)
    tl.store(normalizer + row, safe + tl.log(tl.sum(sums * tl.exp(tops - safe), 0)))
    best = tl.full([BLOCK_K], -0x7FFFFFFFFFFFFFFF, tl.int64)
    i = tl.arange(0, BLOCK_C * BLOCK_K)
    for part in range(0, PARTS, BLOCK_C):
        their_part = part + i // BLOCK_K
        held = their_part < PARTS
        other = partial + (row * PARTS + their_part) * 130 + i % BLOCK_K
        high = tl.load(other, mask=held, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
        low = tl.load(other + BLOCK_K, mask=held, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
        theirs = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        theirs = tl.where(held, theirs, -0x7FFFFFFFFFFFFFFF)
        both = tl.join(best, tl.topk(theirs, BLOCK_K))
        best = tl.topk(tl.reshape(both, [2 * BLOCK_K]), BLOCK_K)
    index = index_of(best)
    taken = c < TOP
    value = value_of(best)
    tl.store(values + row * TOP + c, value, mask=taken)
    tl.store(indices + row * TOP + c, index, mask=taken)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(logits, temperature, values, indices, normalizer, partial, arrived, pdl=False):
    """Fills values, indices and normalizer; all tensors are contiguous."""
    rows = logits.shape[0]
    if rows:
        kernel[(rows, 16)](
            logits,
            temperature,
            values,
            indices,
            normalizer,
            partial,
            arrived,
            num_warps=8,
            num_stages=1,
            **(OVERLAPPED if pdl else {}),
        )
