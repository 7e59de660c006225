"""y = silu(gate) * up, (gate, up) = rms_norm(x) W^T for at most 1 tokens, W [22016, 4096].

Grid: (blocks of columns of y,).
One program computes 1 columns of y for every token, 2048 columns of x a step.
Products by multiply-add, sums in float32, rounded once.
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
    norm_weight,
    weight,
    y,
    N: tl.constexpr = 11008,
    K: tl.constexpr = 4096,
    BLOCK_N: tl.constexpr = 1,
    BLOCK_K: tl.constexpr = 2048,
    EPS: tl.constexpr = 1e-05,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_rows = weight + n.to(tl.int64) * K
    up_rows = weight + (N + n).to(tl.int64) * K
    # Main loop: W streams by, x stays in the cache.
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    for step in tl.static_range(0, K, BLOCK_K):
        k = step + tl.arange(0, BLOCK_K)
        gate_tile = tl.load(gate_rows[:, None] + k[None, :], eviction_policy="evict_first")
        up_tile = tl.load(up_rows[:, None] + k[None, :], eviction_policy="evict_first")
        a = tl.load(x + k[None, :], eviction_policy="evict_last")
        a = a.to(tl.float32)
        squares += a * a
        a *= tl.load(norm_weight + k).to(tl.float32)[None, :]
        gate += gate_tile.to(tl.float32) * a
        up += up_tile.to(tl.float32) * a
    gate = tl.sum(gate, 1)
    up = tl.sum(up, 1)
    inverse = tl.rsqrt(tl.sum(squares, 1) / K + EPS)
    gate *= inverse
    up *= inverse
    # Epilogue.
    out = activation(gate) * up
    tl.store(y + n, out)


def launch(x, norm_weight, weight, y):
    """Fills y; all tensors are contiguous."""
    tokens = x.numel() // 4096
    if not 0 < tokens <= 1:
        raise ValueError(f"this kernel takes 1 to 1 tokens, not {tokens}")
    kernel[(11008,)](x, norm_weight, weight, y, num_warps=4, num_stages=1)
