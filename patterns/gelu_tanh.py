"""GELU by tanh: y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))). arXiv:1606.08415, section 2."""

import math
from typing import Any

import torch
from torch import Tensor

from fuser.fused import fused_op
from fuser.pattern import either, op
from fuser.patterns.gelu import halved

SCALE, CUBIC = math.sqrt(2 / math.pi), 0.044715


@fused_op("x[*B] -> y[*B]")
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation, element by element."""
    return torch.nn.functional.gelu(x, approximate="tanh")


@gelu_tanh.source
def cubed(x: Any) -> Any:
    square = x * x
    cube = either((x * square) * CUBIC, x * (square * CUBIC), (x * CUBIC) * square)
    return halved(x, op.Tanh((x + cube) * SCALE) + 1)


@gelu_tanh.source
def factored(x: Any) -> Any:
    factor = either((x * x) * CUBIC, x * (x * CUBIC)) + 1
    return halved(x, op.Tanh(either((x * SCALE) * factor, x * (factor * SCALE), (x * factor) * SCALE)) + 1)


@gelu_tanh.source
def standard(x: Any) -> Any:
    return op.Gelu(x, approximate="tanh")


@gelu_tanh.source
def contributed(x: Any) -> Any:
    return op.microsoft.FastGelu(x)


@gelu_tanh.lower("ort")
def _(op: Any, x: Any) -> Any:
    return op.microsoft.FastGelu(x)


@gelu_tanh.lower("onnx", opset=20)
def _(op: Any, x: Any) -> Any:
    return op.Gelu(x, approximate="tanh") if op.opset >= 20 else gelu_tanh.lowerings["functions"](op, x)


@gelu_tanh.lower("functions")
def _(op: Any, x: Any) -> Any:
    cube = op.Mul(op.Mul(x, op.Mul(x, x)), op.scalar_like(CUBIC, x))
    tanh = op.Tanh(op.Mul(op.Add(x, cube), op.scalar_like(SCALE, x)))
    return op.Mul(op.Mul(x, op.scalar_like(0.5, x)), op.Add(tanh, op.scalar_like(1.0, x)))


gelu_tanh.examples({"B": (2, 3, 20)}, {"B": (7,)})
