"""y = silu(gate) * up, (gate, up) = x W^T for at most 16 tokens, W [22016, 4096] as int4:128.

Grid: (blocks of columns of y, 2 parts of K).
One program computes 64 columns of y for every token, 128 columns of x a step.
The last of a block's parts to arrive adds them all, in their order, so results repeat bit by bit.
Products by tensor cores, sums in float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def activation(x):
    """SiLU, in float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def halves(v, FACTOR: tl.constexpr):
    """Both halves of words as numbers: (code - zero) * 2^-6."""
    low = (v & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True) * FACTOR + -0.125
    high = (v >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) * FACTOR + -0.125
    return tl.join(low, high)


@triton.jit
def values(words, lowest):
    """Words [rows, 4 J] as (code - zero) * 2^-6 [rows, 32 J], rows and columns in their order."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    second = lowest << 4  # in their place, 16 times as much
    a, b = halves(words & lowest, 1.7014118346046923e38), halves(words & second, 1.0633823966279327e37)
    words >>= 8
    c, d = halves(words & lowest, 1.7014118346046923e38), halves(words & second, 1.0633823966279327e37)
    all = tl.join(tl.join(a, c), tl.join(b, d)).reshape(2, ROWS // 16, 8, 4, J, 2, 2, 2)
    return all.permute(1, 0, 2, 4, 6, 7, 3, 5).reshape(ROWS, 32 * J)


@triton.jit
def kernel(
    x,
    weight,
    scales,
    y,
    partial,
    arrived,
    tokens,
    lowest,
    N: tl.constexpr = 11008,
    K: tl.constexpr = 4096,
    BLOCK_N: tl.constexpr = 64,
    BLOCK_K: tl.constexpr = 128,
    BLOCK_M: tl.constexpr = 16,
    SPLITS: tl.constexpr = 2,
    STEPS: tl.constexpr = 32,
    UNITS: tl.constexpr = 1376,
    ROWS: tl.constexpr = 128,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    m_inside = m < tokens
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, ROWS)
    unit = tl.program_id(0) * (ROWS // 16) + i // 8 % (ROWS // 16)
    within = i // (ROWS // 2) * 8 + i % 8
    words = weight + unit * (STEPS * 256) + within * 16
    word = tl.arange(0, 16)
    # Main loop: codes stream by, x stays in the cache.
    sums = tl.zeros([ROWS, BLOCK_M], tl.float32)
    columns = tl.arange(0, 128)
    begin = tl.program_id(1) * 16
    end = tl.minimum(begin + 16, STEPS)
    scale_0 = tl.load(scales + begin * (UNITS * 16) + row)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in range(begin, end):
        tile = tl.load(words[:, None] + step * 256 + word[None, :], eviction_policy="evict_first")
        k = step * 128 + columns
        x_0 = tl.load(x + m[None, :] * K + k[:, None], mask=m_inside[None, :], other=0.0, eviction_policy="evict_last")
        following = tl.minimum(step + 1, STEPS - 1)
        scale_0_next = tl.load(scales + following * (UNITS * 16) + row)
        sums += tl.dot(values(tile, lowest), x_0) * (scale_0.to(tl.float32) * 64.0)[:, None]
        scale_0 = scale_0_next
    gate, up = tl.split(sums.reshape(ROWS // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
    gate = gate.reshape(BLOCK_N, BLOCK_M)
    up = up.reshape(BLOCK_N, BLOCK_M)
    # Every part leaves its sums; the last to arrive adds them in order.
    inner = m[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    block = partial + tl.program_id(0).to(tl.int64) * (SPLITS * (2 * BLOCK_N * BLOCK_M))
    own = block + tl.program_id(1) * (2 * BLOCK_N * BLOCK_M)
    tl.store(own + inner, gate, mask=m_inside[None, :])
    tl.store(own + BLOCK_N * BLOCK_M + inner, up, mask=m_inside[None, :])
    tl.debug_barrier()  # the counter follows what all threads stored
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
    if before != SPLITS - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, SPLITS, 2):
        for part in tl.static_range(2):  # all on their way before the first is added
            other = block + (first + part) * (2 * BLOCK_N * BLOCK_M)
            gate += tl.load(other + inner, mask=m_inside[None, :], other=0.0, cache_modifier=".cg")
            up += tl.load(other + BLOCK_N * BLOCK_M + inner, mask=m_inside[None, :], other=0.0, cache_modifier=".cg")
    # Epilogue.
    out = activation(gate) * up
    tl.store(y + m[None, :] * N + n[:, None], out, mask=m_inside[None, :])


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(x, weight, scales, y, partial, arrived, pdl=False):
    """Fills y; all tensors are contiguous."""
    tokens = x.numel() // 4096
    if not 0 < tokens <= 16:
        raise ValueError(f"this kernel takes 1 to 16 tokens, not {tokens}")
    kernel[(172, 2)](
        x,
        weight,
        scales,
        y,
        partial,
        arrived,
        tokens,
        0xF000F,
        num_warps=4,
        num_stages=4,
        **(OVERLAPPED if pdl else {}),
    )
