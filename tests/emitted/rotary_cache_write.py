"""Rotary embedding of 32 query and 8 key heads, cache write of keys and values.

Grid: (tokens, 8 blocks of query heads + 2 blocks of key heads).
One program turns 4 heads of one token, 128 of 128 channels, pairs (i, i + 64),
and writes keys and values to their slot, which is given. In float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    slot_mapping,
    turned,
    k_cache,
    v_cache,
    q_stride,
    k_stride,
    v_stride,
    H: tl.constexpr = 32,
    G: tl.constexpr = 8,
    D: tl.constexpr = 128,
    R: tl.constexpr = 64,
    PAGE: tl.constexpr = 16,
    BLOCK_H: tl.constexpr = 4,
    BLOCK_R: tl.constexpr = 64,
    BLOCK_D: tl.constexpr = 128,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    cosine = tl.load(cos + position * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + position * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    if tl.program_id(1) < 8:
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        inside = (h < H) & (r < R)[None, :]
        first = h * D + r[None, :]
        second = first + R
        a = tl.load(q + token * q_stride + first, mask=inside).to(tl.float32)
        b = tl.load(q + token * q_stride + second, mask=inside).to(tl.float32)
        tl.store(turned + token * (H * D) + first, a * cosine - b * sine, mask=inside)
        tl.store(turned + token * (H * D) + second, b * cosine + a * sine, mask=inside)
    else:
        h = (tl.program_id(1) - 8) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot < 0:
            return
        inside = (h < G) & (r < R)[None, :]
        first = h * D + r[None, :]
        second = first + R
        a = tl.load(k + token * k_stride + first, mask=inside).to(tl.float32)
        b = tl.load(k + token * k_stride + second, mask=inside).to(tl.float32)
        tl.store(k_cache + slot * (G * D) + first, a * cosine - b * sine, mask=inside)
        tl.store(k_cache + slot * (G * D) + second, b * cosine + a * sine, mask=inside)
        d = tl.arange(0, BLOCK_D)[None, :]
        whole = (h < G) & (d < D)
        value = tl.load(v + token * v_stride + h * D + d, mask=whole)
        tl.store(v_cache + slot * (G * D) + h * D + d, value, mask=whole)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(q, k, v, cos, sin, positions, slot_mapping, turned, k_cache, v_cache, pdl=False):
    """Fills turned and the slots of the caches; the rows of q, k and v may be strided."""
    tokens = positions.shape[0]
    if tokens:
        kernel[(tokens, 10)](
            q,
            k,
            v,
            cos,
            sin,
            positions,
            slot_mapping,
            turned,
            k_cache,
            v_cache,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            num_warps=2,
            num_stages=1,
            **(OVERLAPPED if pdl else {}),
        )
