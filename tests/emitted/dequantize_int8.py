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
    D: tl.constexpr = 128,
    R: tl.constexpr = 64,
    STEPS: tl.constexpr = 64,
    UNITS: tl.constexpr = 384,
    ROWS: tl.constexpr = 64,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    step = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, ROWS)
    unit = tl.program_id(0) * (ROWS // 16) + i // 8 % (ROWS // 16)
    within = i // (ROWS // 2) * 8 + i % 8
    words = weight + unit * (STEPS * 256) + within * 16
    word = tl.arange(0, 16)
    n = row // 16 * 8 + row % 8
    # Rows of W by pairs that turn together, within one head; what does not turn is in pairs as well.
    head = n // (D // 2)
    pair = n % (D // 2)
    a_row = head * D + pair
    b_row = head * D + R + pair
    target = y + tl.where(row % 16 < 8, a_row, b_row).to(tl.int64)[:, None] * K
    scale_0 = tl.load(scales + step * (UNITS * 16) + row)
    zero_0 = tl.load(zeros + step * (UNITS * 16) + unit * 16 + within)
    tile = tl.load(words[:, None] + step * 256 + word[None, :], eviction_policy="evict_first")
    made = values(tile, lowest, zero_0).to(tl.float32) * (scale_0.to(tl.float32) * 64.0)[:, None]
    k = step * 64 + 0 + tl.arange(0, 64)
    tl.store(target + k[None, :], made)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(weight, scales, zeros, y, pdl=False):
    """Fills y."""
    kernel[(96, 64)](weight, scales, zeros, y, 0xFF00FF, num_warps=4, num_stages=1, **(OVERLAPPED if pdl else {}))
