"""Attention: y = softmax(softcap(q k^T * scale) + mask) v, with grouped heads. arXiv:1706.03762, arXiv:2305.13245."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuser import dims
from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.fused import Inputs, Source, fused_op
from fuser.graph import Value
from fuser.pattern import Match, applies, capture, either, keep, maybe, number, op, optional, require
from fuser.patterns.heads import arranged, by_head, require_heads, shape_by_head, split_heads


@fused_op("q[*Q], k[*K], v[*V], mask[*M]? -> y[*Y]")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    heads: Sequence[int],
    scale: float,
    softcap: float = 0.0,
    guarded: bool = False,
    merged: bool = False,
) -> Tensor:
    """q [B, H, S, Dh] or [B, S, H Dh], k [B, G, T, Dh] or [B, T, G Dh], v likewise, heads = (H, G); y [B, H, S, Dv], or
    [B, S, H Dv] if `merged`. Each key head serves H / G query heads; softmax in float32.

    `mask` broadcasts to [B, H, S, T]: bool (True: attend), or float, added in its own type after `softcap` (0: none).
    A row whose scores are all minus infinity gives zeros if `guarded`, else nothing defined (here NaN).
    """
    H, G = heads
    q, k, v = by_head(q, H), by_head(k, G), by_head(v, G)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    keys, values = (x.to(wide).repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = (scores.to(mask.dtype) + mask).to(wide)
    weights = scores.softmax(-1)
    y = ((weights.nan_to_num(0.0) if guarded else weights) @ values).to(q.dtype)
    return y.transpose(1, 2).flatten(2) if merged else y


@attention.shapes
def _(
    bound: dict[str, Any], inputs: Sequence[Value | None], *, heads: tuple[int, int], merged: bool, **others: Any
) -> list[Shape]:
    q, k, v = (
        shape_by_head(value.shape or (), count) if value is not None else ()
        for value, count in zip(inputs, (heads[0], heads[1], heads[1]), strict=False)
    )
    require(
        q[3] == k[3] and q[0] == k[0] == v[0], "attention: queries and keys must have one batch and width", inputs[0]
    )
    require(k[:3] == v[:3], "attention: keys and values must have the same heads and tokens", inputs[2])
    batch, count, length, width = q[0], heads[0], q[2], v[3]
    return [(batch, length, dims.mul(count, width)) if merged else (batch, count, length, width)]


def _repeated(x: Any) -> Any:
    """Each key head once for every query head it serves."""
    return either(op.Reshape(op.Expand(op.Unsqueeze(x, axes=(2,)))), x)


def _product(rows: Any, x: Any) -> Any:
    """rows @ x; where x has fewer heads it is repeated, or the rows of the heads it serves are taken as one head's."""
    return either(rows @ _repeated(x), op.Reshape(op.Reshape(rows) @ x))


def _weighted(scores: Any, v: Any) -> Any:
    weights = maybe(op.Cast(op.Softmax(maybe(op.Cast(scores)), axis=-1)))
    return _product(either(op.Where(op.IsNaN(weights), 0, weights), weights), v)


def _scores(q: Any, k: Any) -> Any:
    """q k^T with its scale in any place: on q, on k, on both, or after; then perhaps soft-capped."""
    k_scale, scale = number("k_scale"), number("scale")
    repeated = _repeated(k)
    keys = either(
        op.Transpose(repeated, perm=(0, 1, 3, 2)) * k_scale,
        op.Transpose(either(repeated * k_scale, repeated), perm=(0, 1, 3, 2)),
    )
    queries = either(q * number("q_scale"), q)
    raw = either(queries @ keys, op.Reshape(op.Reshape(queries) @ keys))
    scaled = either(raw * scale, raw)
    return either(op.Tanh(scaled * number("inner")) * number("outer"), scaled)


@attention.source
def additive(q: Any, k: Any, v: Any, mask: Any, allowed: Any) -> Any:
    scores = _scores(q, k)
    chosen = keep(op.Where(allowed, 0, number("lowest")))
    return _weighted(either(scores + chosen, scores + mask), v)


@attention.source
def filled(q: Any, k: Any, v: Any, allowed: Any) -> Any:
    return _weighted(op.Where(allowed, _scores(q, k), number("lowest")), v)


@attention.source
def unmasked(q: Any, k: Any, v: Any) -> Any:
    return _weighted(_scores(q, k), v)


def _heads(m: Match) -> tuple[int, int]:
    """(H, G) of queries and keys that are arranged by head."""
    for name in ("q", "k", "v"):
        require_heads("attention", name, m.values[name])
    return m.q.shape[1], m.k.shape[1]


def _declare(source: Source) -> None:
    @source.attributes
    def _(m: Match) -> dict[str, Any]:
        heads = _heads(m)
        scales = [m.scalar(name) for name in ("q_scale", "k_scale", "scale") if name in m.values]
        softcap = m.scalar("outer") if "outer" in m.values else 0.0
        if softcap:
            capped = abs(softcap * m.scalar("inner") - 1) < 1e-3  # one over it may be stored in float16
            require(capped, "attention: softcap must divide before tanh and multiply after", m.inner)
        guarded = any(node.is_a("IsNaN") for node in m.region)
        scale = math.prod(scales, start=1.0)
        return {"heads": heads, "scale": scale, "softcap": softcap, "guarded": guarded, "merged": False}

    @source.inputs
    def _(m: Match) -> Inputs:
        if m.lowest is None:
            return {}
        infinite = math.isinf(m.scalar("lowest"))
        if m.kept and not infinite:
            (chosen,) = m.kept
            return {"mask": chosen.output}  # a row that may attend to nothing then attends to everything
        require(infinite, "attention: masked scores must be minus infinity", m.lowest)
        return {"mask": m.allowed}


for _source in (additive, filled, unmasked):
    _declare(_source)


def _attends(allowed: Any) -> Any:
    """Whether a row of a mask attends to anything."""
    flags = keep(op.Cast(allowed, to=DType.FLOAT32.onnx))
    return keep(op.Cast(keep(op.ReduceMax(flags, axes=(-1,), keepdims=1)), to=DType.BOOL.onnx))


@attention.source
def standard(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """The operator alone, or with what the lowering below puts around it."""
    bounded = either(keep(op.Max(mask, number("least"))), mask)
    given = optional(either(keep(op.Expand(bounded)), bounded))
    y = op.Attention(
        q, _repeated(k), _repeated(v), given, is_causal=0, scale=capture("scale"), softcap=capture("softcap")
    )
    attends = either(
        _attends(mask),
        keep(op.Not(keep(op.IsInf(keep(op.ReduceMax(mask, axes=(-1,), keepdims=1)))))),
    )
    return either(op.Where(attends, y, 0), y)


@standard.attributes
def _(m: Match) -> dict[str, Any]:
    applies(m.q.rank == 4)
    is_float = m.mask is not None and m.mask.dtype is not DType.BOOL
    # To the lowest number in a mask ONNX gives no meaning of its own, and ONNX Runtime that of minus infinity.
    bounded = m.least is not None and m.scalar("least") <= LEAST[m.mask.dtype]
    applies(not is_float or bounded or least(m.mask) >= 1.001 * LEAST[m.mask.dtype])  # as it is stored
    heads = _heads(m)
    scale = m.attributes["scale"]
    return {
        "heads": heads,
        "scale": 1 / math.sqrt(m.q.shape[-1]) if scale is None else scale,
        "softcap": m.attributes["softcap"] or 0.0,
        "guarded": not is_float or any(node.is_a("Where") for node in m.region),
        "merged": False,
    }


@attention.source
def guarded(q: Any, k: Any, v: Any, allowed: Any) -> Any:
    """Rows that may attend to nothing, made zeros afterwards."""
    captured = {name: capture(name) for name in ("heads", "scale", "softcap", "merged")}
    y = attention(q, k, v, keep(op.Where(allowed, 0, number("lowest"))), **captured, guarded=False)
    attends = _attends(allowed)
    return either(op.Where(keep(op.Not(attends)), 0, y), op.Where(attends, y, 0))


@guarded.attributes
def _(m: Match) -> dict[str, Any]:
    applies(not m.attributes["merged"])
    require(m.scalar("lowest") < -1e4, "attention: masked scores must be very low", m.lowest)
    return {**m.attributes, "guarded": True}


@guarded.inputs
def _(m: Match) -> Inputs:
    return {"mask": m.allowed}


def least(mask: Value) -> float:
    """The least a mask can be, where it chooses between two numbers; minus infinity where that is not known."""
    chosen = mask.producer
    numbers = (
        [None if value is None else value.scalar for value in chosen.inputs[1:]]
        if chosen is not None and chosen.is_a("Where")
        else []
    )
    return min((-math.inf if number is None else number for number in numbers), default=-math.inf)


@attention.source
def tokens(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """With the arrangement by head before it, and of its result back."""
    captured = {name: capture(name) for name in ("heads", "scale", "softcap", "guarded")}
    y = attention(split_heads(q), split_heads(k), split_heads(v), optional(mask), **captured, merged=False)
    return op.Reshape(op.Transpose(y, perm=(0, 2, 1, 3)))


@tokens.attributes
def _(m: Match) -> dict[str, Any]:
    heads = m.attributes["heads"]
    for name, count in (("q", heads[0]), ("k", heads[1]), ("v", heads[1])):
        require_heads("attention", name, m.values[name], count)
    require(m.outputs[0].rank == 3, "attention: heads must be merged to [B, S, heads * width]", m.outputs[0])
    return {**m.attributes, "merged": True}


# Above the type's lowest number, which some versions of ONNX Runtime take for minus infinity.
LEAST = {DType.FLOAT16: -6e4, DType.BFLOAT16: -1e30, DType.FLOAT32: -1e30, DType.FLOAT64: -1e30}


@attention.lower("functions")
def _(
    op: Any, q: Any, k: Any, v: Any, mask: Any, *,
    heads: Sequence[int], scale: Any, softcap: Any, guarded: bool, merged: bool,
) -> Any:  # fmt: skip
    H, G = heads
    q, k, v = arranged(op, q, H), arranged(op, k, G), arranged(op, v, G)
    width = v.shape[3]

    def shaped(x: Any, *shape: Any) -> Any:
        return op.Reshape(x, op.constant(shape, DType.INT64))

    # The query heads of a group are rows of one product: no key is repeated.
    rows = shaped(op.Mul(q, op.scalar_like(scale, q)), 0, G, -1, q.shape[3])
    scores = shaped(op.MatMul(rows, op.Transpose(k, perm=(0, 1, 3, 2))), 0, H, -1, 0)
    if softcap:
        scores = op.Mul(op.Tanh(op.Div(scores, op.scalar_like(softcap, scores))), op.scalar_like(softcap, scores))
    if mask is not None and mask.dtype is DType.BOOL:
        scores = op.Where(mask, scores, op.scalar_like(-math.inf, scores))
    elif mask is not None:
        scores = op.Add(scores, mask)
    weights = op.Softmax(op.Cast(scores, to=op.FLOAT), axis=-1)
    if guarded:
        weights = op.Where(op.IsNaN(weights), op.scalar_like(0.0, weights), weights)
    result = shaped(op.MatMul(shaped(op.CastLike(weights, q), 0, G, -1, 0), v), 0, H, -1, width)
    return shaped(op.Transpose(result, perm=(0, 2, 1, 3)), 0, 0, H * width) if merged else result


_SIZES = {"B": 2, "S": 3, "T": 7, "Dh": 16, "Dv": 12}
_GROUPED = {
    **_SIZES,
    "heads": (4, 2),
    "Q": ("B", 4, "S", "Dh"),
    "K": ("B", 2, "T", "Dh"),
    "V": ("B", 2, "T", "Dv"),
    "merged": False,
}
_SINGLE = {
    **_SIZES,
    "heads": (3, 3),
    "Q": ("B", 3, "S", "Dh"),
    "K": ("B", 3, "T", "Dh"),
    "V": ("B", 3, "T", "Dv"),
    "merged": False,
}
_TOKENS = {**_SIZES, "heads": (4, 2), "Q": ("B", "S", 64), "K": ("B", "T", 32), "V": ("B", "T", 24), "merged": True}
_CACHED = {**_GROUPED, "Q": ("B", "S", 64), "merged": True}
_FULL, _KEYS = ("B", 1, "S", "T"), ("B", 1, 1, "T")
attention.examples(
    {**_GROUPED, "scale": 0.25, "softcap": 0.0, "guarded": True, "without": ("mask",)},
    {**_SINGLE, "scale": 1.0, "softcap": 0.0, "guarded": False, "without": ("mask",)},
    {**_SINGLE, "scale": 0.25, "softcap": 5.0, "guarded": False, "without": ("mask",)},
    {**_GROUPED, "M": _FULL, "kinds": {"mask": "bool"}, "scale": 0.25, "softcap": 0.0, "guarded": True},
    {**_SINGLE, "M": _KEYS, "kinds": {"mask": "bool"}, "scale": 0.2, "softcap": 5.0, "guarded": False},
    {**_SINGLE, "M": _KEYS, "kinds": {"mask": "bool"}, "scale": 0.3, "softcap": 5.0, "guarded": True},
    {**_GROUPED, "M": _FULL, "kinds": {"mask": "lowest"}, "scale": 0.25, "softcap": 0.0, "guarded": True},
    {**_GROUPED, "M": _KEYS, "kinds": {"mask": "lowest"}, "scale": 0.25, "softcap": 5.0, "guarded": False},
    {**_GROUPED, "M": ("S", "T"), "kinds": {"mask": "infinite"}, "scale": 0.25, "softcap": 0.0, "guarded": True},
    {**_SINGLE, "M": (3, "S", "T"), "scale": 1.0, "softcap": 5.0, "guarded": False},
    {**_TOKENS, "M": _FULL, "kinds": {"mask": "bool"}, "scale": 0.25, "softcap": 0.0, "guarded": True},
    {**_CACHED, "M": _FULL, "kinds": {"mask": "lowest"}, "scale": 0.25, "softcap": 0.0, "guarded": True},
    {**_TOKENS, "scale": 0.25, "softcap": 5.0, "guarded": False, "without": ("mask",)},
)
