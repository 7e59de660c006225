"""y = W [6144, 4096], of 8-bit codes.

Grid: (blocks of rows, steps of K).
One program makes 64 rows of one step. Numbers in float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def halves(v, FACTOR: tl.constexpr, zero):
    """Both halves of words as numbers: (code - zero) * 2^-6."""
    low = (v & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True) * FACTOR + zero[:, None]
    high = (v >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) * FACTOR + zero[:, None]
    return tl.join(low, high)


@triton.jit
def values(words, lowest, zero):
    """Words [rows, 4 J] as (code - zero) * 2^-6 [rows, 16 J], rows and columns in their order."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    a = halves(words & lowest, 1.7014118346046923e38, zero)
    b = halves((words >> 8) & lowest, 1.7014118346046923e38, zero)
    all = tl.join(a, b).reshape(2, ROWS // 16, 8, 4, J, 2, 2)
    return all.permute(1, 0, 2, 4, 6, 3, 5).reshape(ROWS, 16 * J)


@triton.jit
def kernel(
    weight,
    scales,
    zeros,
    y,
    lowest,
    N: tl.constexpr = 3072,
    K: tl.constexpr = 4096,
    BLOCK_N: tl.constexpr = 64,
    D: tl.constexpr = 128,
    R: tl.constexpr = 64,
    STEPS: tl.constexpr = 64,
    UNITS: tl.constexpr = 192,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    i = tl.arange(0, BLOCK_N)
    unit = tl.program_id(0) * (BLOCK_N // 16) + i // 8 % (BLOCK_N // 16)
    within = i // (BLOCK_N // 2) * 8 + i % 8
    word = tl.arange(0, 16)
    a_words = weight + unit * (STEPS * 256) + within * 16
    b_words = weight + (1 * UNITS + unit) * (STEPS * 256) + within * 16
    # Rows of W by pairs that turn together, within one head; what does not turn is in pairs as well.
    head = n // (D // 2)
    pair = n % (D // 2)
    a_row = head * D + pair
    b_row = head * D + R + pair
    a_scale_0 = tl.load(scales + (step * 2 + 0) * N + n)
    a_zero_0 = tl.load(zeros + (step * 2 + 0) * N + unit * 16 + within)
    b_scale_0 = tl.load(scales + (step * 2 + 1) * N + n)
    b_zero_0 = tl.load(zeros + (step * 2 + 1) * N + unit * 16 + within)
    a_tile = tl.load(a_words[:, None] + step * 256 + word[None, :], eviction_policy="evict_first")
    made = values(a_tile, lowest, a_zero_0).to(tl.float32) * (a_scale_0.to(tl.float32) * 64.0)[:, None]
    k = step * 64 + 0 + tl.arange(0, 64)
    tl.store(y + a_row.to(tl.int64)[:, None] * K + k[None, :], made)
    b_tile = tl.load(b_words[:, None] + step * 256 + word[None, :], eviction_policy="evict_first")
    made = values(b_tile, lowest, b_zero_0).to(tl.float32) * (b_scale_0.to(tl.float32) * 64.0)[:, None]
    k = step * 64 + 0 + tl.arange(0, 64)
    tl.store(y + b_row.to(tl.int64)[:, None] * K + k[None, :], made)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(weight, scales, zeros, y, pdl=False):
    """Fills y."""
    kernel[(48, 64)](weight, scales, zeros, y, 0xFF00FF, num_warps=4, num_stages=1, **(OVERLAPPED if pdl else {}))
