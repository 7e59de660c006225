"""q, k, v = rms_norm(x) W^T for at most 1 tokens, W [6144, 4096].

Grid: (blocks of pairs of rows of W, 8 parts of K).
One program computes 64 pairs of rows of W for every token, 64 columns of x a step.
The last of a block's parts to arrive adds them all, in their order, so results repeat bit by bit.
Then 32 heads of q and 8 of k turn; k and v go to their slots.
Products by multiply-add, sums in float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    x,
    weight,
    q_norm_weight,
    k_norm_weight,
    cos,
    sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    y,
    partial,
    arrived,
    N: tl.constexpr = 3072,
    K: tl.constexpr = 4096,
    BLOCK_N: tl.constexpr = 64,
    BLOCK_K: tl.constexpr = 64,
    H: tl.constexpr = 32,
    G: tl.constexpr = 8,
    D: tl.constexpr = 128,
    R: tl.constexpr = 64,
    EPS: tl.constexpr = 1e-06,
    SPLITS: tl.constexpr = 8,
    PART: tl.constexpr = 512,
    PDL: tl.constexpr = False,
    HEAD_EPS: tl.constexpr = 1e-06,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows of W by pairs that turn together, within one head; what does not turn is in pairs as well.
    head = n // (D // 2)
    pair = n % (D // 2)
    a_row = head * D + pair
    b_row = head * D + R + pair
    a_rows = weight + a_row.to(tl.int64) * K
    b_rows = weight + b_row.to(tl.int64) * K
    # Main loop: W streams by, x stays in the cache.
    a = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    begin = tl.program_id(1) * PART
    end = tl.minimum(begin + PART, K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in range(begin, end, BLOCK_K):
        k = step + tl.arange(0, BLOCK_K)
        a_tile = tl.load(a_rows[:, None] + k[None, :], eviction_policy="evict_first")
        b_tile = tl.load(b_rows[:, None] + k[None, :], eviction_policy="evict_first")
        tokens_tile = tl.load(x + k[None, :], eviction_policy="evict_last")
        wide = tokens_tile.to(tl.float32)
        squares += wide * wide
        a += a_tile.to(tl.float32) * wide
        b += b_tile.to(tl.float32) * wide
    a = tl.sum(a, 1)
    b = tl.sum(b, 1)
    squares = tl.sum(squares, 1)
    # Every part leaves its sums; the last to arrive adds them in order.
    inner = tl.arange(0, BLOCK_N)
    one = tl.arange(0, 1)
    block = partial + tl.program_id(0).to(tl.int64) * (SPLITS * (2 * BLOCK_N + 1))
    own = block + tl.program_id(1) * (2 * BLOCK_N + 1)
    tl.store(own + inner, a)
    tl.store(own + BLOCK_N + inner, b)
    tl.store(own + 2 * BLOCK_N + one, squares)
    tl.debug_barrier()  # the counter follows what all threads stored
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
    if before != SPLITS - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch
    a = tl.zeros([BLOCK_N], tl.float32)
    b = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([1], tl.float32)
    for first in range(0, SPLITS, 8):
        for part in tl.static_range(8):  # all on their way before the first is added
            other = block + (first + part) * (2 * BLOCK_N + 1)
            a += tl.load(other + inner, cache_modifier=".cg")
            b += tl.load(other + BLOCK_N + inner, cache_modifier=".cg")
            squares += tl.load(other + 2 * BLOCK_N + one, cache_modifier=".cg")
    inverse = tl.rsqrt(squares / K + EPS)
    a *= inverse
    b *= inverse
    # Epilogue.
    is_query = head < H
    is_key = (head >= H) & (head < H + G)
    is_value = head >= H + G
    # A program holds one head: its root mean square, of queries and keys.
    of_head = tl.rsqrt(tl.sum(a * a + b * b, 0) / D + HEAD_EPS)
    of_head = tl.where(is_value, 1.0, of_head)
    scale = tl.load(q_norm_weight + a_row - head * D, mask=is_query, other=1.0).to(tl.float32)
    scale *= tl.load(k_norm_weight + a_row - head * D, mask=is_key, other=1.0).to(tl.float32)
    a *= of_head * scale
    scale = tl.load(q_norm_weight + b_row - head * D, mask=is_query, other=1.0).to(tl.float32)
    scale *= tl.load(k_norm_weight + b_row - head * D, mask=is_key, other=1.0).to(tl.float32)
    b *= of_head * scale
    m = tl.arange(0, 1)
    slot = tl.load(slot_mapping + m).to(tl.int64)
    position = tl.load(positions + m).to(tl.int64)
    turns = is_query | is_key
    angle = position * R + pair
    cosine = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
    turned_a = a * cosine - b * sine
    turned_b = b * cosine + a * sine
    tl.store(y + m * (H * D) + a_row, turned_a, mask=is_query)
    tl.store(y + m * (H * D) + b_row, turned_b, mask=is_query)
    tl.store(k_cache + slot * (G * D) + a_row - H * D, turned_a, mask=is_key & (slot >= 0))
    tl.store(k_cache + slot * (G * D) + b_row - H * D, turned_b, mask=is_key & (slot >= 0))
    tl.store(v_cache + slot * (G * D) + a_row - (H + G) * D, turned_a, mask=is_value & (slot >= 0))
    tl.store(v_cache + slot * (G * D) + b_row - (H + G) * D, turned_b, mask=is_value & (slot >= 0))


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(
    x,
    weight,
    q_norm_weight,
    k_norm_weight,
    cos,
    sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    y,
    partial,
    arrived,
    pdl=False,
):
    """Fills y and the slots of the caches; all tensors are contiguous."""
    tokens = x.numel() // 4096
    if not 0 < tokens <= 1:
        raise ValueError(f"this kernel takes 1 to 1 tokens, not {tokens}")
    kernel[(48, 8)](
        x,
        weight,
        q_norm_weight,
        k_norm_weight,
        cos,
        sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        y,
        partial,
        arrived,
        num_warps=4,
        num_stages=1,
        **(OVERLAPPED if pdl else {}),
    )
