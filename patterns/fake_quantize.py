"""Activations rounded to eight bits, token by token, and back: what a product with quantized inputs computes with.

y = round(x / s) s, s = max|x| / 127 over the last axis (E4M3: 448, and the nearest E4M3 number for the nearest integer).
"""

from typing import Any

from torch import Tensor

from fuser.dtypes import DType
from fuser.errors import UnsupportedOperator
from fuser.formats import FP8_MOST
from fuser.fused import fused_op
from fuser.quantized import round_activations

FP8_OPSET = 19  # the first that has its numbers


@fused_op("x[*B, D] -> y[*B, D]")
def fake_quantize(x: Tensor, *, kind: str) -> Tensor:
    """x [*B, D], each row of its last axis by a scale of its own; `kind`: int8 or fp8. Computed in float32."""
    return round_activations(x, kind)


@fake_quantize.lower("ort")
def _(op: Any, x: Any, *, kind: str) -> Any:
    if kind == "fp8" and op.opset < FP8_OPSET:
        raise UnsupportedOperator(f"activations are rounded to fp8 by opset {FP8_OPSET} or newer, not {op.opset}")
    wide = op.Cast(x, to=op.FLOAT)
    most = op.ReduceMax(op.Abs(wide), axes=(-1,), keepdims=1)
    largest = op.Constant(value_float=FP8_MOST if kind == "fp8" else 127.0)
    scale = op.Where(
        op.Greater(most, op.Constant(value_float=0.0)), op.Div(most, largest), op.Constant(value_float=1.0)
    )
    rows = op.Div(wide, scale)
    rounded = op.Round(rows) if kind == "int8" else op.Cast(op.Cast(rows, to=DType.FLOAT8_E4M3FN.onnx), to=op.FLOAT)
    return op.CastLike(op.Mul(rounded, scale), x)


@fake_quantize.lower("functions")
def _(op: Any, x: Any, *, kind: str) -> Any:
    return fake_quantize.lowerings["ort"](op, x, kind=kind)


fake_quantize.examples({"B": (2, 3), "D": 20, "kind": "int8"}, {"B": (5,), "D": 7, "kind": "int8"})
