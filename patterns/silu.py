"""SiLU (swish): y = x * sigmoid(x). arXiv:1702.03118."""

from typing import Any

import torch
from torch import Tensor

from fuser.fused import fused_op
from fuser.pattern import either, op


@fused_op("x[*B] -> y[*B]")
def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), element by element."""
    return torch.nn.functional.silu(x)


@silu.source
def decomposed(x: Any) -> Any:
    return x * op.Sigmoid(x)


@silu.source
def exponential(x: Any) -> Any:
    denominator = 1 + op.Exp(-x)
    return either(x / denominator, x * op.Reciprocal(denominator))


@silu.source
def standard(x: Any) -> Any:
    return op.Swish(x, alpha=1.0)


@silu.source
def contributed(x: Any) -> Any:
    return op.microsoft.QuickGelu(x, alpha=1.0)


@silu.lower("ort")
def _(op: Any, x: Any) -> Any:
    return op.microsoft.QuickGelu(x, alpha=1.0)


@silu.lower("functions")
def _(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Sigmoid(x))


silu.examples({"B": (2, 3, 20)}, {"B": (7,)})
