"""Activations rounded to eight bits, token by token, and back: what a product with quantized inputs computes with.

y = round(x / s) s, s = max|x| / 127 over the last axis (E4M3: 448, and the nearest E4M3 number for the nearest integer).
"""

from typing import Any

from torch import Tensor

from fuser.errors import UnsupportedOperator
from fuser.fused import fused_op
from fuser.quantized import round_activations


@fused_op("x[*B, D] -> y[*B, D]")
def fake_quantize(x: Tensor, *, kind: str) -> Tensor:
    """x [*B, D], each row of its last axis by a scale of its own; `kind`: int8 or fp8. Computed in float32."""
    return round_activations(x, kind)


@fake_quantize.lower("ort")
def _(op: Any, x: Any, *, kind: str) -> Any:
    if kind != "int8":
        raise UnsupportedOperator(f"no lowering rounds activations to {kind}")
    wide = op.Cast(x, to=op.FLOAT)
    most = op.ReduceMax(op.Abs(wide), axes=(-1,), keepdims=1)
    zero = op.Constant(value_float=0.0)
    scale = op.Where(op.Greater(most, zero), op.Div(most, op.Constant(value_float=127.0)), op.Constant(value_float=1.0))
    return op.CastLike(op.Mul(op.Round(op.Div(wide, scale)), scale), x)


@fake_quantize.lower("functions")
def _(op: Any, x: Any, *, kind: str) -> Any:
    return fake_quantize.lowerings["ort"](op, x, kind=kind)


fake_quantize.examples({"B": (2, 3), "D": 20, "kind": "int8"}, {"B": (5,), "D": 7, "kind": "int8"})
