"""Residual add and LayerNorm in one pass: total = x + skip, y = layer_norm(total); both are used."""

from typing import Any

from torch import Tensor

from fuser.dtypes import DType
from fuser.fused import fused_op
from fuser.graph import Value, is_static
from fuser.pattern import Match, applies, capture, op, optional
from fuser.patterns.layer_norm import layer_norm


@fused_op("x[*B, D], skip[*B, D], weight[D], bias[D]? -> y[*B, D], total[*B, D]")
def skip_layer_norm(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + skip), x + skip) for x, skip [*B, D], weight and bias [D]."""
    total = x + skip
    return layer_norm.reference(total, weight, bias, eps=eps), total


@skip_layer_norm.source
def source(x: Any, skip: Any, weight: Any, bias: Any) -> Any:
    total = x + skip
    return layer_norm(total, weight, optional(bias), eps=capture("eps")), total


def residual_add(m: Match) -> None:
    """A residual joins two activations; adding a bias or a position table is another thing."""
    applies(not is_static(m.x) and not is_static(m.skip))


@source.attributes
def _(m: Match) -> dict[str, Any]:
    residual_add(m)
    return m.attributes


@skip_layer_norm.source
def contributed(x: Any, skip: Any, weight: Any, bias: Any) -> Any:
    y, _, _, total = op.microsoft.SkipLayerNormalization(
        x, skip, weight, optional(bias), epsilon=capture("eps"), outputs=4
    )
    return y, total


@skip_layer_norm.source
def contributed_sole(x: Any, skip: Any, weight: Any, bias: Any) -> Any:
    return op.microsoft.SkipLayerNormalization(x, skip, weight, optional(bias), epsilon=capture("eps"))


def skip_node_takes(x: Value, weight: Value) -> bool:
    """ONNX Runtime's skip nodes take [tokens, D] and [batch, length, D], and one type of at most 32 bits."""
    one_type = weight.dtype is x.dtype is not DType.FLOAT64
    return x.shape is not None and len(x.shape) in (2, 3) and one_type


@skip_layer_norm.lower("ort")
def _(op: Any, x: Any, skip: Any, weight: Any, bias: Any, *, eps: float) -> Any:
    # In float16 the skip node rounds the residual stream at every layer, as that of RMSNorm does.
    if x.dtype is DType.FLOAT16 or not skip_node_takes(x, weight):
        total = op.Add(x, skip)
        return layer_norm.lowerings["ort"](op, total, weight, bias, eps=eps), total
    y, _, _, total = op.microsoft.SkipLayerNormalization(x, skip, weight, bias, epsilon=eps, outputs=4)
    return y, total


@skip_layer_norm.lower("onnx")
def _(op: Any, x: Any, skip: Any, weight: Any, bias: Any, *, eps: float) -> Any:
    total = op.Add(x, skip)
    return layer_norm.lowerings["onnx"](op, total, weight, bias, eps=eps), total


@skip_layer_norm.lower("functions")
def _(op: Any, x: Any, skip: Any, weight: Any, bias: Any, *, eps: Any) -> Any:
    total = op.Add(x, skip)
    return layer_norm.lowerings["functions"](op, total, weight, bias, eps=eps), total


skip_layer_norm.examples({"B": (2, 3), "D": 20, "eps": 1e-5}, {"B": (7,), "D": 33, "eps": 1e-6, "without": ("bias",)})
