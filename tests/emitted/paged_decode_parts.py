"""Paged attention, decode: 32 query heads, 8 key heads of 128.

Grid: (sequences x key heads, 8 parts of the keys).
One program takes 4 query heads of one sequence through one part of its keys.
The last part to arrive combines them all, in their order, so results repeat bit by bit.
16 keys a step, pages of 16. Products by tensor cores, in float32.
"""

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
    BLOCK_T: tl.constexpr = 16,
    BLOCK_D: tl.constexpr = 128,
    SCALE: tl.constexpr = 0.12751743082459868,
    WIDE: tl.constexpr = False,
    SPLITS: tl.constexpr = 8,
    BLOCK_P: tl.constexpr = 8,
    BLOCK_R: tl.constexpr = 4,
    CHUNK: tl.constexpr = 8,
    SCRATCH: tl.constexpr = 4160,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
    whole = start + tl.maximum(last - start, 0) // BLOCK_T * BLOCK_T
    for step in range(start, whole, BLOCK_T):
        t = step + tl.arange(0, BLOCK_T)
        block = tl.load(table + step // PAGE)
        slot = (block.to(tl.int64) if WIDE else block) * PAGE + step % PAGE + tl.arange(0, BLOCK_T)
        place = (slot * G + g)[:, None] * D + d[None, :]
        keys = tl.load(k_cache + place)
        values = tl.load(v_cache + place)
        scores = tl.dot(queries_tile, tl.trans(keys))
        above = tl.maximum(highest, tl.max(scores, 1) * SCALE)
        weights = tl.exp2(scores * SCALE - above[:, None])
        decay = tl.exp2(highest - above)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_cache.dtype.element_ty), values, acc * decay[:, None])
        highest = above
    for step in range(whole, last, BLOCK_T):
        t = step + tl.arange(0, BLOCK_T)
        t_inside = t < last
        block = tl.load(table + step // PAGE)
        slot = (block.to(tl.int64) if WIDE else block) * PAGE + step % PAGE + tl.arange(0, BLOCK_T)
        place = (slot * G + g)[:, None] * D + d[None, :]
        keys = tl.load(k_cache + place, mask=t_inside[:, None], other=0.0)
        values = tl.load(v_cache + place, mask=t_inside[:, None], other=0.0)
        scores = tl.dot(queries_tile, tl.trans(keys))
        scores = tl.where(t_inside[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1) * SCALE)
        safe = tl.where(above > float("-inf"), above, 0.0)  # of a row that has seen no key
        weights = tl.exp2(scores * SCALE - safe[:, None])
        decay = tl.exp2(highest - safe)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_cache.dtype.element_ty), values, acc * decay[:, None])
        highest = above
    # Every part leaves its sums; the last to arrive combines them in order.
    sums = partial + tl.program_id(0).to(tl.int64) * SCRATCH
    maxima = sums + SPLITS * GROUP * BLOCK_D
    totals = maxima + SPLITS * GROUP
    own = tl.program_id(1) * GROUP + m
    tl.store(sums + own[:, None] * BLOCK_D + d[None, :], acc, mask=row_inside[:, None])
    tl.store(maxima + own, highest, mask=row_inside)
    tl.store(totals + own, total, mask=row_inside)
    tl.debug_barrier()  # the counter follows what all threads stored
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
    if before != SPLITS - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch
    r = tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    every = p[:, None] * GROUP + r[None, :]
    part_inside = (p < SPLITS)[:, None] & (r < GROUP)[None, :]
    tops = tl.load(maxima + every, mask=part_inside, other=float("-inf"), cache_modifier=".cg")
    counts = tl.load(totals + every, mask=part_inside, other=0.0, cache_modifier=".cg")
    highest = tl.max(tops, 0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)  # of a row that has seen no key
    total = tl.sum(counts * tl.exp2(tops - highest[None, :]), 0)
    result = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first_part in range(0, SPLITS, CHUNK):
        c = first_part + tl.arange(0, CHUNK)
        some = c[:, None] * GROUP + r[None, :]
        some_inside = (c < SPLITS)[:, None] & (r < GROUP)[None, :]
        top = tl.load(maxima + some, mask=some_inside, other=float("-inf"), cache_modifier=".cg")
        place = sums + some[:, :, None] * BLOCK_D + d[None, None, :]
        parts = tl.load(place, mask=some_inside[:, :, None], other=0.0, cache_modifier=".cg")
        result += tl.sum(parts * tl.exp2(top - highest[None, :])[:, :, None], 0)
    # A row that sees no key gives 0.
    result = result / tl.where(total > 0.0, total, 1.0)[:, None]
    rows = (sequence.to(tl.int64) * H + g * GROUP + r) * D
    tl.store(y + rows[:, None] + d[None, :], result, mask=(r < GROUP)[:, None])


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(q, k_cache, v_cache, block_table, context_lens, y, partial, arrived, pdl=False):
    """Fills y; all tensors are contiguous."""
    sequences = context_lens.shape[0]
    if sequences:
        kernel[(sequences * 8, 8)](
            q,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            y,
            partial,
            arrived,
            block_table.stride(0),
            WIDE=k_cache.numel() >= 2**31,
            num_warps=1,
            num_stages=8,
            **(OVERLAPPED if pdl else {}),
        )
