"""Rotary embedding of 32 query and 8 key heads, cache write of keys and values.

Grid: (tokens, 8 blocks of query heads + 2 blocks of key heads).
One program turns 4 heads of one token, 128 of 128 channels, pairs (i, i + 64),
and writes keys and values to their slot, which is given. In float32, rounded once.
They are int8, by groups of 64 channels.
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
    k_scale,
    v_scale,
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
    GROUPS: tl.constexpr = 2,
    W: tl.constexpr = 64,
    BLOCK_GROUPS: tl.constexpr = 2,
    BLOCK_W: tl.constexpr = 64,
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
        head = h[:, :, None]
        group = tl.arange(0, BLOCK_GROUPS)[None, :, None]
        w = tl.arange(0, BLOCK_W)[None, None, :]
        d = group * W + w
        held = (head < G) & (group < GROUPS) & (w < W)
        x = tl.load(k + token * k_stride + head * D + d, mask=held, other=0.0).to(tl.float32)
        turns = held & (d < 2 * R)
        other = tl.load(k + token * k_stride + head * D + (tl.where(d < R, d + R, d - R)), mask=turns, other=0.0).to(
            tl.float32
        )
        angle = position * R + d % R
        key_cosine = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
        key_sine = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        x = x * key_cosine + tl.where(d < R, -other, other) * key_sine
        scale = scale_of(tl.max(magnitude(x), 2, keep_dims=True))
        tl.store(k_cache + slot * (G * D) + head * D + d, codes_of(x, scale), mask=held)
        place = k_scale + slot // PAGE * (G * GROUPS * PAGE) + slot % PAGE
        tl.store(place + (head * GROUPS + group) * PAGE, scale, mask=(head < G) & (group < GROUPS))
        x = tl.load(v + token * v_stride + head * D + d, mask=held, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(magnitude(x), 2, keep_dims=True))
        tl.store(v_cache + slot * (G * D) + head * D + d, codes_of(x, scale), mask=held)
        place = v_scale + slot // PAGE * (G * GROUPS * PAGE) + slot % PAGE
        tl.store(place + (head * GROUPS + group) * PAGE, scale, mask=(head < G) & (group < GROUPS))


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(q, k, v, cos, sin, positions, slot_mapping, turned, k_cache, v_cache, k_scale, v_scale, pdl=False):
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
            k_scale,
            v_scale,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            num_warps=2,
            num_stages=1,
            **(OVERLAPPED if pdl else {}),
        )
