"""LayerNorm: y = (x - mean) * rsqrt(var + eps) * weight + bias over the last axis, in float32. arXiv:1607.06450."""

from typing import Any

import torch
from torch import Tensor

from fuser.fused import fused_op
from fuser.pattern import Match, capture, maybe, op, optional


@fused_op("x[*B, D], weight[D], bias[D]? -> y[*B, D]")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """x [*B, D] over its last axis, then weight [D] and bias [D]; computed in float32 or wider, rounded once."""
    wide = x if x.dtype == torch.float64 else x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def _scaled(x: Any, weight: Any, eps: Any) -> Any:
    wide = maybe(op.Cast(x))
    centered = wide - op.ReduceMean(wide, axes=(-1,), keepdims=1)
    y = centered * op.Rsqrt(op.ReduceMean(centered * centered, axes=(-1,), keepdims=1) + eps)
    return maybe(op.Cast(y)) * weight


@layer_norm.source
def decomposed(x: Any, weight: Any, bias: Any, eps: Any) -> Any:
    return maybe(op.Cast(_scaled(x, weight, eps) + bias))


@layer_norm.source
def unbiased(x: Any, weight: Any, eps: Any) -> Any:
    return maybe(op.Cast(_scaled(x, weight, eps)))


@decomposed.attributes
@unbiased.attributes
def _(m: Match) -> dict[str, Any]:
    return {"eps": m.scalar("eps")}


@layer_norm.source
def standard(x: Any, weight: Any, bias: Any) -> Any:
    return op.LayerNormalization(x, weight, optional(bias), axis=-1, epsilon=capture("eps"))


@layer_norm.lower("ort")
def _(op: Any, x: Any, weight: Any, bias: Any, *, eps: float) -> Any:
    if weight.dtype is not x.dtype:  # the operator takes one type
        wide = op.Cast(x, to=weight.dtype.onnx)
        return op.Cast(layer_norm.lowerings["ort"](op, wide, weight, bias, eps=eps), to=x.dtype.onnx)
    return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps, stash_type=1)


@layer_norm.lower("onnx")
def _(op: Any, x: Any, weight: Any, bias: Any, *, eps: float) -> Any:
    return layer_norm.lowerings["ort" if op.opset >= 17 else "functions"](op, x, weight, bias, eps=eps)


@layer_norm.lower("functions")
def _(op: Any, x: Any, weight: Any, bias: Any, *, eps: Any) -> Any:
    wide = op.widened(x)
    centered = op.Sub(wide, op.ReduceMean(wide, axes=(-1,), keepdims=1))
    variance = op.ReduceMean(op.Mul(centered, centered), axes=(-1,), keepdims=1)
    y = op.Div(centered, op.Sqrt(op.Add(variance, op.number(eps, wide))))
    y = op.Mul(y, op.widened(weight))
    return op.CastLike(y if bias is None else op.Add(y, op.widened(bias)), x)


layer_norm.examples(
    {"B": (2, 3), "D": 20, "eps": 1e-5},
    {"B": (5,), "D": 33, "eps": 1e-12},
    {"B": (1, 4), "D": 16, "eps": 1e-3, "without": ("bias",)},
)
