"""y = silu(gate) * up, W [22016, 4096].

Grid: (tiles of y,), in groups of rows of tiles, whose parts of W and x stay in the cache.
One program computes 128 rows and 64 columns of y, 64 of K a step.
Products by tensor cores, sums in float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def activation(x):
    """SiLU, in float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def kernel(
    x,
    weight,
    y,
    M,
    x_stride,
    N: tl.constexpr = 11008,
    K: tl.constexpr = 4096,
    BLOCK_M: tl.constexpr = 128,
    BLOCK_N: tl.constexpr = 64,
    BLOCK_K: tl.constexpr = 64,
    GROUP: tl.constexpr = 8,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Tiles of a group of rows one after another, column by column.
    columns = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    high = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    m = (first + within % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // high * BLOCK_N + tl.arange(0, BLOCK_N)
    # What is past the end wraps around, and is not stored.
    rows = x + (m % M).to(tl.int64)[:, None] * x_stride
    inside = n % N
    gate_columns = weight + inside.to(tl.int64)[None, :] * K
    up_columns = weight + (N + inside).to(tl.int64)[None, :] * K
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, K, BLOCK_K):
        k = step + tl.arange(0, BLOCK_K)
        a = tl.load(rows + k[None, :])
        b = tl.load(gate_columns + k[:, None])
        gate = tl.dot(a, b, gate)
        b = tl.load(up_columns + k[:, None])
        up = tl.dot(a, b, up)
    out = activation(gate) * up
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    stored = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + place, out, mask=stored)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(x, weight, y, pdl=False):
    """Fills y; rows of x may be strided."""
    M = x.shape[0]
    if M:
        kernel[(triton.cdiv(M, 128) * 172,)](
            x, weight, y, M, x.stride(0), num_warps=8, num_stages=3, **(OVERLAPPED if pdl else {})
        )
