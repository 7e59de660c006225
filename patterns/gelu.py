"""GELU, exact: y = x/2 * (1 + erf(x / sqrt(2))). arXiv:1606.08415."""

import math
from typing import Any

import torch
from torch import Tensor

from fuser.fused import fused_op
from fuser.pattern import either, op


@fused_op("x[*B] -> y[*B]")
def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x, element by element."""
    return torch.nn.functional.gelu(x)


def halved(x: Any, one_plus: Any) -> Any:
    """x/2 * one_plus, multiplied in any order."""
    return either((x * 0.5) * one_plus, x * (one_plus * 0.5), (x * one_plus) * 0.5)


@gelu.source
def decomposed(x: Any) -> Any:
    return halved(x, op.Erf(x * math.sqrt(0.5)) + 1)


@gelu.source
def standard(x: Any) -> Any:
    return op.Gelu(x, approximate="none")


@gelu.source
def contributed(x: Any) -> Any:
    return op.microsoft.Gelu(x)


@gelu.lower("ort")
def _(op: Any, x: Any) -> Any:
    return op.microsoft.Gelu(x)


@gelu.lower("onnx", opset=20)
def _(op: Any, x: Any) -> Any:
    return op.Gelu(x) if op.opset >= 20 else gelu.lowerings["functions"](op, x)


@gelu.lower("functions")
def _(op: Any, x: Any) -> Any:
    erf = op.Erf(op.Mul(x, op.scalar_like(math.sqrt(0.5), x)))
    return op.Mul(op.Mul(x, op.scalar_like(0.5, x)), op.Add(erf, op.scalar_like(1.0, x)))


gelu.examples({"B": (2, 3, 20)}, {"B": (7,)})
