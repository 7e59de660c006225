"""Residual add and RMSNorm in one pass: total = x + skip, y = rms_norm(total); both are used."""

from typing import Any

from torch import Tensor

from fuser.dtypes import DType
from fuser.fused import fused_op
from fuser.pattern import Match, capture, op, optional
from fuser.patterns.rms_norm import rms_norm
from fuser.patterns.skip_layer_norm import residual_add, skip_node_takes


@fused_op("x[*B, D], skip[*B, D], weight[D]? -> y[*B, D], total[*B, D]")
def skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor | None = None, *, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + skip), x + skip) for x, skip [*B, D] and weight [D]."""
    total = x + skip
    return rms_norm.reference(total, weight, eps=eps), total


@skip_rms_norm.source
def source(x: Any, skip: Any, weight: Any) -> Any:
    total = x + skip
    return rms_norm(total, optional(weight), eps=capture("eps")), total


@source.attributes
def _(m: Match) -> dict[str, Any]:
    residual_add(m)
    return m.attributes


@skip_rms_norm.source
def contributed(x: Any, skip: Any, weight: Any) -> Any:
    y, _, _, total = op.microsoft.SkipSimplifiedLayerNormalization(x, skip, weight, epsilon=capture("eps"), outputs=4)
    return y, total


@skip_rms_norm.source
def contributed_sole(x: Any, skip: Any, weight: Any) -> Any:
    return op.microsoft.SkipSimplifiedLayerNormalization(x, skip, weight, epsilon=capture("eps"))


@skip_rms_norm.lower("ort")
def _(op: Any, x: Any, skip: Any, weight: Any, *, eps: float) -> Any:
    # In float16 the skip node rounds the residual stream at every layer. Beside an Add, which ONNX Runtime's CPU provider
    # computes in float32, the model's error would be up to 2.2 times what it was.
    if weight is None or x.dtype is DType.FLOAT16 or not skip_node_takes(x, weight):
        total = op.Add(x, skip)
        return rms_norm.lowerings["ort"](op, total, weight, eps=eps), total
    y, _, _, total = op.microsoft.SkipSimplifiedLayerNormalization(x, skip, weight, epsilon=eps, outputs=4)
    return y, total


@skip_rms_norm.lower("onnx", opset=23)
def _(op: Any, x: Any, skip: Any, weight: Any, *, eps: float) -> Any:
    total = op.Add(x, skip)
    return rms_norm.lowerings["onnx"](op, total, weight, eps=eps), total


@skip_rms_norm.lower("functions")
def _(op: Any, x: Any, skip: Any, weight: Any, *, eps: Any) -> Any:
    total = op.Add(x, skip)
    return rms_norm.lowerings["functions"](op, total, weight, eps=eps), total


skip_rms_norm.examples(
    {"B": (2, 3), "D": 20, "eps": 1e-5},
    {"B": (7,), "D": 33, "eps": 1e-6},
    {"B": (1, 5), "D": 64, "eps": 1e-2, "without": ("weight",)},
)
