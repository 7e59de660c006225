"""y = x W^T for at most 1 tokens, W [4096, 4096] as nf4:64.

Grid: (blocks of columns of y, 16 parts of K).
One program computes 64 columns of y for every token, 128 columns of x a step.
The last of a block's parts to arrive adds them all, in their order, so results repeat bit by bit.
Products by tensor cores, sums in float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def halved(words):
    """Words [rows, 4 J] of the first and of the second half of the columns."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    first, second = tl.split(words.reshape(ROWS, 4, 2, J // 2).permute(0, 1, 3, 2))
    return first.reshape(ROWS, 2 * J), second.reshape(ROWS, 2 * J)


LOOK_UP = tl.constexpr("""
{ .reg .b32 s, t, a, b, c, lo, hi;
and.b32 s, $4, 0x77777777;  // places in tables of eight
shr.u32 t, $4, 1; lop3.b32 t, t, 0x44444444, 0x32103210, 0xea;  // which of two tables
mov.b32 a, 0xca063280; mov.b32 b, 0x00ba3d92; prmt.b32 a, a, b, s;
mov.b32 b, 0xad7c25a3; mov.b32 c, 0x803910e2; prmt.b32 b, b, c, s;
prmt.b32 lo, a, b, t;
mov.b32 a, 0xbebfbfbf; mov.b32 b, 0x00bdbebe; prmt.b32 a, a, b, s;
mov.b32 b, 0x3e3e3e3d; mov.b32 c, 0x3f3f3f3e; prmt.b32 b, b, c, s;
prmt.b32 hi, a, b, t;
prmt.b32 $0, lo, hi, 0x5140; prmt.b32 $1, lo, hi, 0x7362;
shr.u32 s, s, 16; shr.u32 t, t, 16;
mov.b32 a, 0xca063280; mov.b32 b, 0x00ba3d92; prmt.b32 a, a, b, s;
mov.b32 b, 0xad7c25a3; mov.b32 c, 0x803910e2; prmt.b32 b, b, c, s;
prmt.b32 lo, a, b, t;
mov.b32 a, 0xbebfbfbf; mov.b32 b, 0x00bdbebe; prmt.b32 a, a, b, s;
mov.b32 b, 0x3e3e3e3d; mov.b32 c, 0x3f3f3f3e; prmt.b32 b, b, c, s;
prmt.b32 hi, a, b, t;
prmt.b32 $2, lo, hi, 0x5140; prmt.b32 $3, lo, hi, 0x7362; }
""")


@triton.jit
def level(words, PLACE: tl.constexpr):
    """The bits of the levels of one code of each word."""
    code = (words >> (4 * PLACE)) & 15
    found = tl.zeros(words.shape, tl.int32)
    found = tl.where(code == 0, 49024, found)
    found = tl.where(code == 1, 48946, found)
    found = tl.where(code == 2, 48902, found)
    found = tl.where(code == 3, 48842, found)
    found = tl.where(code == 4, 48786, found)
    found = tl.where(code == 5, 48701, found)
    found = tl.where(code == 6, 48570, found)
    found = tl.where(code == 8, 15779, found)
    found = tl.where(code == 9, 15909, found)
    found = tl.where(code == 10, 15996, found)
    found = tl.where(code == 11, 16045, found)
    found = tl.where(code == 12, 16098, found)
    found = tl.where(code == 13, 16144, found)
    found = tl.where(code == 14, 16185, found)
    return tl.where(code == 15, 16256, found)


@triton.jit
def pair(v):
    """Both halves of words as numbers."""
    low = (v & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (v >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def values(words, NATIVE: tl.constexpr):
    """Words [rows, 4 J] as levels [rows, 32 J], rows and columns in their order."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    if NATIVE:
        a, b, c, d = tl.inline_asm_elementwise(
            LOOK_UP, "=r,=r,=r,=r,r", [words], (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        a = level(words, 0) | level(words, 1) << 16
        b = level(words, 2) | level(words, 3) << 16
        c = level(words, 4) | level(words, 5) << 16
        d = level(words, 6) | level(words, 7) << 16
    all = tl.join(tl.join(pair(a), pair(c)), tl.join(pair(b), pair(d))).reshape(2, ROWS // 16, 8, 4, J, 2, 2, 2)
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
    N: tl.constexpr = 4096,
    K: tl.constexpr = 4096,
    BLOCK_N: tl.constexpr = 64,
    BLOCK_K: tl.constexpr = 128,
    BLOCK_M: tl.constexpr = 16,
    SPLITS: tl.constexpr = 16,
    STEPS: tl.constexpr = 32,
    UNITS: tl.constexpr = 256,
    NATIVE: tl.constexpr = False,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    m_inside = m < tokens
    i = tl.arange(0, BLOCK_N)
    unit = tl.program_id(0) * (BLOCK_N // 16) + i // 8 % (BLOCK_N // 16)
    within = i // (BLOCK_N // 2) * 8 + i % 8
    word = tl.arange(0, 16)
    out_words = weight + unit * (STEPS * 256) + within * 16
    # Main loop: codes stream by, x stays in the cache.
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    columns = tl.arange(0, 64)
    begin = tl.program_id(1) * 2
    out_tile_0 = tl.load(out_words[:, None] + (begin + 0) * 256 + word[None, :], eviction_policy="evict_first")
    out_tile_1 = tl.load(out_words[:, None] + (begin + 1) * 256 + word[None, :], eviction_policy="evict_first")
    out_scale_0_0 = tl.load(scales + (((begin + 0) * 2 + 0) * 1 + 0) * N + n)
    out_scale_0_1 = tl.load(scales + (((begin + 0) * 2 + 1) * 1 + 0) * N + n)
    out_scale_1_0 = tl.load(scales + (((begin + 1) * 2 + 0) * 1 + 0) * N + n)
    out_scale_1_1 = tl.load(scales + (((begin + 1) * 2 + 1) * 1 + 0) * N + n)
    if PDL:
        tl.extra.cuda.gdc_wait()
    k = (begin + 0) * 128 + columns
    x_0_0 = tl.load(x + m[None, :] * K + k[:, None], mask=m_inside[None, :], other=0.0, eviction_policy="evict_last")
    k = (begin + 0) * 128 + 64 + columns
    x_0_1 = tl.load(x + m[None, :] * K + k[:, None], mask=m_inside[None, :], other=0.0, eviction_policy="evict_last")
    k = (begin + 1) * 128 + columns
    x_1_0 = tl.load(x + m[None, :] * K + k[:, None], mask=m_inside[None, :], other=0.0, eviction_policy="evict_last")
    k = (begin + 1) * 128 + 64 + columns
    x_1_1 = tl.load(x + m[None, :] * K + k[:, None], mask=m_inside[None, :], other=0.0, eviction_policy="evict_last")
    out_tile_0_0, out_tile_0_1 = halved(out_tile_0)
    out += tl.dot(values(out_tile_0_0, NATIVE), x_0_0) * (out_scale_0_0.to(tl.float32) * 1.0)[:, None]
    out += tl.dot(values(out_tile_0_1, NATIVE), x_0_1) * (out_scale_0_1.to(tl.float32) * 1.0)[:, None]
    out_tile_1_0, out_tile_1_1 = halved(out_tile_1)
    out += tl.dot(values(out_tile_1_0, NATIVE), x_1_0) * (out_scale_1_0.to(tl.float32) * 1.0)[:, None]
    out += tl.dot(values(out_tile_1_1, NATIVE), x_1_1) * (out_scale_1_1.to(tl.float32) * 1.0)[:, None]
    # Every part leaves its sums; the last to arrive adds them in order.
    inner = m[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    block = partial + tl.program_id(0).to(tl.int64) * (SPLITS * (1 * BLOCK_N * BLOCK_M))
    own = block + tl.program_id(1) * (1 * BLOCK_N * BLOCK_M)
    tl.store(own + inner, out, mask=m_inside[None, :])
    tl.debug_barrier()  # the counter follows what all threads stored
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
    if before != SPLITS - 1:
        return
    tl.debug_barrier()
    tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, SPLITS, 8):
        for part in tl.static_range(8):  # all on their way before the first is added
            other = block + (first + part) * (1 * BLOCK_N * BLOCK_M)
            out += tl.load(other + inner, mask=m_inside[None, :], other=0.0, cache_modifier=".cg")
    # Epilogue.
    tl.store(y + m[None, :] * N + n[:, None], out, mask=m_inside[None, :])


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(x, weight, scales, y, partial, arrived, pdl=False):
    """Fills y; all tensors are contiguous."""
    tokens = x.numel() // 4096
    if not 0 < tokens <= 1:
        raise ValueError(f"this kernel takes 1 to 1 tokens, not {tokens}")
    kernel[(64, 16)](
        x,
        weight,
        scales,
        y,
        partial,
        arrived,
        tokens,
        NATIVE=x.is_cuda,
        num_warps=4,
        num_stages=1,
        **(OVERLAPPED if pdl else {}),
    )
