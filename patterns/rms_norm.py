"""RMSNorm: y = x * rsqrt(mean(x^2, -1) + eps) * weight, statistics in float32. arXiv:1910.07467."""

from typing import Any

import torch
from torch import Tensor

from fuser.fused import fused_op
from fuser.pattern import Match, capture, maybe, op, require


@fused_op("x[*B, D], weight[D]? -> y[*B, D]")
def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """x [*B, D] over its last axis, scaled by weight [D]; computed in float32 or wider, rounded once to x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def _normalized(x: Any, eps: Any) -> Any:
    wide = maybe(op.Cast(x))
    return wide * op.Rsqrt(op.ReduceMean(wide * wide, axes=(-1,), keepdims=1) + eps)


@rms_norm.source
def decomposed(x: Any, weight: Any, eps: Any) -> Any:
    return maybe(op.Cast(maybe(op.Cast(_normalized(x, eps))) * maybe(op.Cast(weight))))


@decomposed.attributes
def _(m: Match) -> dict[str, Any]:
    return {"eps": m.scalar("eps")}


@rms_norm.source
def unweighted(x: Any, eps: Any) -> Any:
    return maybe(op.Cast(_normalized(x, eps)))


@unweighted.attributes
def _(m: Match) -> dict[str, Any]:
    for reader in m.outputs[0].consumers:
        gammas = [
            v
            for v in reader.inputs
            if reader.is_a("Mul") and v is not None and v.constant is not None and v.scalar is None
        ]
        require(not gammas, "rms_norm: weight must be [D]", gammas[0] if gammas else None)
    return {"eps": m.scalar("eps")}


@rms_norm.source
def standard(x: Any, weight: Any) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=capture("eps"))


@rms_norm.source
def contributed(x: Any, weight: Any) -> Any:
    return op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=capture("eps"))


@rms_norm.lower("ort")
def _(op: Any, x: Any, weight: Any, *, eps: float) -> Any:
    if weight is not None and weight.dtype is not x.dtype:  # the operator takes one type
        wide = op.Cast(x, to=weight.dtype.onnx)
        return op.Cast(rms_norm.lowerings["ort"](op, wide, weight, eps=eps), to=x.dtype.onnx)
    gamma = op.ones_like_last(x) if weight is None else weight
    if op.opset >= 23:
        return op.RMSNormalization(x, gamma, axis=-1, epsilon=eps, stash_type=1)
    return op.SimplifiedLayerNormalization(x, gamma, axis=-1, epsilon=eps, stash_type=1)


@rms_norm.lower("onnx", opset=23)
def _(op: Any, x: Any, weight: Any, *, eps: float) -> Any:
    return rms_norm.lowerings["ort" if op.opset >= 23 else "functions"](op, x, weight, eps=eps)


@rms_norm.lower("functions")
def _(op: Any, x: Any, weight: Any, *, eps: Any) -> Any:
    wide = op.widened(x)
    mean = op.ReduceMean(op.Mul(wide, wide), axes=(-1,), keepdims=1)
    y = op.Div(wide, op.Sqrt(op.Add(mean, op.number(eps, wide))))
    return op.CastLike(y if weight is None else op.Mul(y, op.widened(weight)), x)


rms_norm.examples(
    {"B": (2, 3), "D": 20, "eps": 1e-5},
    {"B": (7,), "D": 33, "eps": 1e-6},
    {"B": (1, 5), "D": 64, "eps": 1e-2, "without": ("weight",)},
)
