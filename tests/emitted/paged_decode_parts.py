"""Paged attention, decode: 32 query heads, 8 key heads of 128.

Grid: (sequences x key heads, 8 parts of the keys).
One program takes 4 query heads of one sequence through one part of its keys.
The last part to arrive combines them all, in their order, so results repeat bit by bit.
64 keys a step, pages of 16. Products by tensor cores, in float32.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    y,
    partial,
    arrived,
    table_stride,
    H: tl.constexpr = 32,
    G: tl.constexpr = 8,
    GROUP: tl.constexpr = 4,
    D: tl.constexpr = 128,
    PAGE: tl.constexpr = 16,
    BLOCK_M: tl.constexpr = 16,
    BLOCK_T: tl.constexpr = 64,
    BLOCK_D: tl.constexpr = 128,
    SCALE: tl.constexpr = 0.12751743082459868,
    SPLITS: tl.constexpr = 8,
    BLOCK_P: tl.constexpr = 8,
):
    sequence = tl.program_id(0) // G
    g = tl.program_id(0) % G
    # Rows: the query heads of one key head.
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    head = g * GROUP + m
    row_inside = m < GROUP
    context = tl.load(context_lens + sequence)
    rows = (sequence.to(tl.int64) * H + head) * D
    first = 0
    last = context
    # This part's keys, whole steps of them.
    start = first // BLOCK_T * BLOCK_T
    length = tl.cdiv(tl.cdiv(context - start, BLOCK_T), SPLITS) * BLOCK_T
    start += tl.program_id(1) * length
    last = tl.minimum(start + length, context)
    inside = row_inside[:, None]
    queries_tile = tl.load(q + rows[:, None] + d[None, :], mask=inside, other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = block_table + sequence.to(tl.int64) * table_stride
    for step in range(start, last, BLOCK_T):
        t = step + tl.arange(0, BLOCK_T)
        t_inside = t < last
        block = tl.load(table + t // PAGE, mask=t_inside, other=0).to(tl.int64)
        slot = block * PAGE + t % PAGE
        place = (slot * G + g)[:, None] * D + d[None, :]
        keys = tl.load(k_cache + place, mask=t_inside[:, None], other=0.0)
        values = tl.load(v_cache + place, mask=t_inside[:, None], other=0.0)
        scores = tl.dot(queries_tile, tl.trans(keys)) * SCALE
        scores = tl.where(t_inside[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(above > float("-inf"), above, 0.0)  # of a row that has seen no key
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(highest - safe)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_cache.dtype.element_ty), values, acc * decay[:, None])
        highest = above
    # Every part leaves its sums; the last to arrive combines them in order.
    scratch = partial + tl.program_id(0).to(tl.int64) * (SPLITS * BLOCK_M * (BLOCK_D + 2))
    own = scratch + (tl.program_id(1) * BLOCK_M + m) * (BLOCK_D + 2)
    tl.store(own[:, None] + d[None, :], acc, mask=row_inside[:, None])
    tl.store(own + BLOCK_D, highest, mask=row_inside)
    tl.store(own + BLOCK_D + 1, total, mask=row_inside)
    tl.debug_barrier()  # the counter follows what all threads stored
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
    if before != SPLITS - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch
    p = tl.arange(0, BLOCK_P)
    all_parts = scratch + (p[None, :] * BLOCK_M + m[:, None]) * (BLOCK_D + 2)
    part_inside = row_inside[:, None] & (p < SPLITS)[None, :]
    maxima = tl.load(all_parts + BLOCK_D, mask=part_inside, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(all_parts + BLOCK_D + 1, mask=part_inside, other=0.0, cache_modifier=".cg")
    highest = tl.max(maxima, 1)
    safe = tl.where(highest > float("-inf"), highest, 0.0)
    total = tl.sum(totals * tl.exp2(maxima - safe[:, None]), 1)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in range(SPLITS):
        row = scratch + (part * BLOCK_M + m) * (BLOCK_D + 2)
        top = tl.load(row + BLOCK_D, mask=row_inside, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(row[:, None] + d[None, :], mask=row_inside[:, None], other=0.0, cache_modifier=".cg")
        result += sums * tl.exp2(top - safe)[:, None]
    # A row that sees no key gives 0.
    result = result / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(y + rows[:, None] + d[None, :], result, mask=inside)


SCRATCH = {}  # by device: the parts' sums, and how many have arrived


def launch(q, k_cache, v_cache, block_table, context_lens, y):
    """Fills y; all tensors are contiguous. Scratch is kept, so launches of a device must follow one another."""
    sequences = context_lens.shape[0]
    groups = sequences * 8
    device = y.device
    if device not in SCRATCH or SCRATCH[device][1].shape[0] < groups:
        SCRATCH[device] = (
            torch.empty(groups * 16640, dtype=torch.float32, device=device),
            torch.zeros(groups, dtype=torch.int32, device=device),
        )
    if sequences:
        kernel[(sequences * 8, 8)](
            q,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            y,
            *SCRATCH[device],
            block_table.stride(0),
            num_warps=4,
            num_stages=3,
        )
