"""q, k, v = x W^T for at most 16 tokens, W [6144, 4096].

Grid: (blocks of pairs of rows of W, 2 parts of K).
One program computes 64 pairs of rows of W for every token, 128 columns of x a step.
The last of a block's parts to arrive adds them all, in their order, so results repeat bit by bit.
Then 32 heads of q and 8 of k turn; k and v go to their slots.
Products by tensor cores, sums in float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(bits):
    """The scales of groups, in float16, of the largest bits of their absolute values: of Inf and NaN it is NaN."""
    wanted = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    near = wanted.to(tl.float16)
    # Rounded up: the nearest one may be smaller, by half where it is subnormal or zero, and the largest would clip.
    above = (near.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    scale = tl.where(near.to(tl.float32) < wanted, above, near)
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def codes_of(x, scale):
    """int8 codes of x, the nearest ones, ties to even; a group of zeros has scale 0."""
    divisor = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    return ((ratio + 12582912.0) - 12582912.0).to(tl.int8)  # where float32 has no fractions


@triton.jit
def magnitude(x):
    """The bits of absolute values, whose order is theirs; NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def kernel(
    x,
    weight,
    cos,
    sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    y,
    partial,
    arrived,
    tokens,
    N: tl.constexpr = 3072,
    K: tl.constexpr = 4096,
    BLOCK_N: tl.constexpr = 64,
    BLOCK_K: tl.constexpr = 128,
    BLOCK_M: tl.constexpr = 16,
    H: tl.constexpr = 32,
    G: tl.constexpr = 8,
    D: tl.constexpr = 128,
    R: tl.constexpr = 64,
    SPLITS: tl.constexpr = 2,
    PART: tl.constexpr = 2048,
    PDL: tl.constexpr = False,
    PAGE: tl.constexpr = 16,
    GROUPS: tl.constexpr = 2,
    W: tl.constexpr = 64,
    PAIRS: tl.constexpr = 64,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    m_inside = m < tokens
    # Rows of W by pairs that turn together, within one head; what does not turn is in pairs as well.
    head = n // (D // 2)
    pair = n % (D // 2)
    a_row = head * D + pair
    b_row = head * D + R + pair
    a_rows = weight + a_row.to(tl.int64) * K
    b_rows = weight + b_row.to(tl.int64) * K
    # Main loop: W streams by, x stays in the cache.
    a = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    begin = tl.program_id(1) * PART
    end = tl.minimum(begin + PART, K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in range(begin, end, BLOCK_K):
        k = step + tl.arange(0, BLOCK_K)
        a_tile = tl.load(a_rows[:, None] + k[None, :], eviction_policy="evict_first")
        b_tile = tl.load(b_rows[:, None] + k[None, :], eviction_policy="evict_first")
        tokens_tile = tl.load(
            x + m[None, :] * K + k[:, None], mask=m_inside[None, :], other=0.0, eviction_policy="evict_last"
        )
        a = tl.dot(a_tile, tokens_tile, a)
        b = tl.dot(b_tile, tokens_tile, b)
    # Every part leaves its sums; the last to arrive adds them in order.
    inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
    block = partial + tl.program_id(0).to(tl.int64) * (SPLITS * (2 * BLOCK_N * BLOCK_M))
    own = block + tl.program_id(1) * (2 * BLOCK_N * BLOCK_M)
    tl.store(own + inner, a)
    tl.store(own + BLOCK_N * BLOCK_M + inner, b)
    tl.debug_barrier()  # the counter follows what all threads stored
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
    if before != SPLITS - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch
    a = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for part in range(SPLITS):
        other = block + part * (2 * BLOCK_N * BLOCK_M)
        a += tl.load(other + inner, cache_modifier=".cg")
        b += tl.load(other + BLOCK_N * BLOCK_M + inner, cache_modifier=".cg")
    # Epilogue.
    is_query = head < H
    is_key = (head >= H) & (head < H + G)
    is_value = head >= H + G
    slot = tl.load(slot_mapping + m, mask=m_inside, other=-1).to(tl.int64)
    position = tl.load(positions + m, mask=m_inside, other=0).to(tl.int64)
    turns = (is_query | is_key)[:, None] & m_inside[None, :]
    angle = position[None, :] * R + pair[:, None]
    cosine = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
    turned_a = a * cosine - b * sine
    turned_b = b * cosine + a * sine
    a = turned_a
    b = turned_b
    scale = scale_of(tl.max(tl.reshape(magnitude(a), [BLOCK_N // PAIRS, PAIRS, BLOCK_M]), 1, keep_dims=True))
    scale_a = tl.reshape(tl.broadcast_to(scale, [BLOCK_N // PAIRS, PAIRS, BLOCK_M]), [BLOCK_N, BLOCK_M])
    scale = scale_of(tl.max(tl.reshape(magnitude(b), [BLOCK_N // PAIRS, PAIRS, BLOCK_M]), 1, keep_dims=True))
    scale_b = tl.reshape(tl.broadcast_to(scale, [BLOCK_N // PAIRS, PAIRS, BLOCK_M]), [BLOCK_N, BLOCK_M])
    tl.store(y + m[None, :] * (H * D) + a_row[:, None], turned_a, mask=is_query[:, None] & m_inside[None, :])
    tl.store(y + m[None, :] * (H * D) + b_row[:, None], turned_b, mask=is_query[:, None] & m_inside[None, :])
    tl.store(
        k_cache + slot[None, :] * (G * D) + (a_row - H * D)[:, None],
        codes_of(a, scale_a),
        mask=is_key[:, None] & (slot >= 0)[None, :],
    )
    tl.store(
        k_cache + slot[None, :] * (G * D) + (b_row - H * D)[:, None],
        codes_of(b, scale_b),
        mask=is_key[:, None] & (slot >= 0)[None, :],
    )
    tl.store(
        v_cache + slot[None, :] * (G * D) + (a_row - (H + G) * D)[:, None],
        codes_of(a, scale_a),
        mask=is_value[:, None] & (slot >= 0)[None, :],
    )
    tl.store(
        v_cache + slot[None, :] * (G * D) + (b_row - (H + G) * D)[:, None],
        codes_of(b, scale_b),
        mask=is_value[:, None] & (slot >= 0)[None, :],
    )
    place = (slot // PAGE * (G * GROUPS * PAGE) + slot % PAGE)[None, :]
    tl.store(
        k_scale + place + (a_row // W - H * GROUPS)[:, None] * PAGE,
        scale_a,
        mask=(is_key & (a_row % W == 0))[:, None] & (slot >= 0)[None, :],
    )
    tl.store(
        k_scale + place + (b_row // W - H * GROUPS)[:, None] * PAGE,
        scale_b,
        mask=(is_key & (b_row % W == 0))[:, None] & (slot >= 0)[None, :],
    )
    tl.store(
        v_scale + place + (a_row // W - (H + G) * GROUPS)[:, None] * PAGE,
        scale_a,
        mask=(is_value & (a_row % W == 0))[:, None] & (slot >= 0)[None, :],
    )
    tl.store(
        v_scale + place + (b_row // W - (H + G) * GROUPS)[:, None] * PAGE,
        scale_b,
        mask=(is_value & (b_row % W == 0))[:, None] & (slot >= 0)[None, :],
    )


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(
    x, weight, cos, sin, positions, slot_mapping, k_cache, v_cache, k_scale, v_scale, y, partial, arrived, pdl=False
):
    """Fills y and the slots of the caches; all tensors are contiguous."""
    tokens = x.numel() // 4096
    if not 0 < tokens <= 16:
        raise ValueError(f"this kernel takes 1 to 16 tokens, not {tokens}")
    kernel[(48, 2)](
        x,
        weight,
        cos,
        sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        y,
        partial,
        arrived,
        tokens,
        num_warps=4,
        num_stages=4,
        **(OVERLAPPED if pdl else {}),
    )
