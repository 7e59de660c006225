"""Paged attention, prefill: 8 query heads, 4 key heads of 80, window 4096, softcap 50.0, ALiBi.

Grid: (tiles of queries x heads of a group, key heads, sequences).
One program computes 128 rows, each a query and a head, from keys up to the last query's.
64 keys a step, pages of 64. Products by tensor cores, in float32.
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
    query_starts,
    slopes,
    y,
    table_stride,
    H: tl.constexpr = 8,
    G: tl.constexpr = 4,
    GROUP: tl.constexpr = 2,
    D: tl.constexpr = 80,
    PAGE: tl.constexpr = 64,
    BLOCK_M: tl.constexpr = 128,
    BLOCK_T: tl.constexpr = 64,
    BLOCK_D: tl.constexpr = 128,
    SCALE: tl.constexpr = 0.1118,
    SOFTCAP: tl.constexpr = 50.0,
    WINDOW: tl.constexpr = 4096,
    WIDE: tl.constexpr = False,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(2)
    g = tl.program_id(1)
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last ones see the most keys: they begin
    query_start = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - query_start
    if tile >= queries * GROUP:
        return
    # Rows: queries, and within one the query heads of one key head.
    m = tile + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = m // GROUP
    head = g * GROUP + m % GROUP
    row_inside = query < queries
    context = tl.load(context_lens + sequence)
    position = context - queries + query
    rows = ((query_start + query).to(tl.int64) * H + head) * D
    last_query = tl.minimum((tile + BLOCK_M - 1) // GROUP, queries - 1)
    last = context - queries + last_query + 1
    first = tl.maximum(context - queries + tile // GROUP + 1 - WINDOW, 0)
    start = first // BLOCK_T * BLOCK_T
    inside = row_inside[:, None] & (d < D)[None, :]
    queries_tile = tl.load(q + rows[:, None] + d[None, :], mask=inside, other=0.0)
    slope = tl.load(slopes + head, mask=row_inside, other=0.0) * 1.4426950408889634
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = block_table + sequence.to(tl.int64) * table_stride
    for step in range(start, last, BLOCK_T):
        t = step + tl.arange(0, BLOCK_T)
        t_inside = t < last
        block = tl.load(table + step // PAGE)
        slot = (block.to(tl.int64) if WIDE else block) * PAGE + step % PAGE + tl.arange(0, BLOCK_T)
        place = (slot * G + g)[:, None] * D + d[None, :]
        keys = tl.load(k_cache + place, mask=t_inside[:, None] & (d < D)[None, :], other=0.0)
        values = tl.load(v_cache + place, mask=t_inside[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(queries_tile, tl.trans(keys)) * SCALE
        # tanh z = 1 - 2 / (exp(2 z) + 1)
        scores = SOFTCAP - 2.0 * SOFTCAP / (tl.exp(scores * (2.0 / SOFTCAP)) + 1.0)
        scores *= 1.4426950408889634
        scores += slope[:, None] * (t[None, :] - position[:, None]).to(tl.float32)
        scores = tl.where(
            (t[None, :] <= position[:, None]) & (t[None, :] > position[:, None] - WINDOW), scores, float("-inf")
        )
        above = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(above > float("-inf"), above, 0.0)  # of a row that has seen no key
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(highest - safe)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_cache.dtype.element_ty), values, acc * decay[:, None])
        highest = above
    # A row that sees no key gives 0.
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(y + rows[:, None] + d[None, :], result, mask=inside)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(q, k_cache, v_cache, block_table, context_lens, query_starts, longest, slopes, y, pdl=False):
    """Fills y; all tensors are contiguous."""
    sequences = context_lens.shape[0]
    if sequences and longest:
        kernel[(triton.cdiv(longest * 2, 128), 4, sequences)](
            q,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            query_starts,
            slopes,
            y,
            block_table.stride(0),
            WIDE=k_cache.numel() >= 2**31,
            num_warps=8,
            num_stages=2,
            **(OVERLAPPED if pdl else {}),
        )
