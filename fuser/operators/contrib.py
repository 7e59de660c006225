"""ONNX Runtime's own operators (domain com.microsoft) that lowerings emit.

Source: docs/ContribOperators.md of ONNX Runtime. SimplifiedLayerNormalization stands in the module of normalizations.
"""

import torch
from torch import Tensor

from fuser.operators.elementwise import gelu, swish
from fuser.operators.normalization import layer_norm, rms_norm
from fuser.operators.table import float32, operator, same_dtype, wide

_DOMAIN = "com.microsoft"


def _skip_sum(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    """x + skip + bias; skip [S, D] or [1, S, D] is shared by the batch."""
    same_dtype(x, skip, bias)
    total = wide(x) + wide(skip)
    return total if bias is None else total + wide(bias)


@operator("SkipLayerNormalization", domain=_DOMAIN)
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = float32(1e-12),
    float_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer norm over the last dim of x + skip + bias; outputs y, mean, inverse deviation and the sum."""
    total = _skip_sum(x, skip, bias)
    y, mean, inverse = layer_norm(total, gamma, beta, [-1], epsilon)
    stash = float_dtype or torch.float32
    return y.to(x.dtype), mean.to(stash), inverse.to(stash), total.to(x.dtype)


@operator("SkipSimplifiedLayerNormalization", domain=_DOMAIN)
def skip_simplified_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = float32(1e-12),
    float_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """RMS norm over the last dim of x + skip + bias; outputs y, none, the inverse root mean square and the sum."""
    total = _skip_sum(x, skip, bias)
    y, inverse = rms_norm(total, gamma, [-1], epsilon)
    return y.to(x.dtype), None, inverse.to(float_dtype or torch.float32), total.to(x.dtype)


@operator("QuickGelu", domain=_DOMAIN)
def quick_gelu(x: Tensor, *, alpha: float = float32(1.702)) -> Tensor:
    """x sigmoid(alpha x)."""
    return swish(x, alpha=alpha)


@operator("Gelu", domain=_DOMAIN)
def exact_gelu(x: Tensor) -> Tensor:
    return gelu(x)


@operator("FastGelu", domain=_DOMAIN)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh approximation of gelu(x + bias)."""
    same_dtype(x, bias)
    return gelu(wide(x) if bias is None else wide(x) + wide(bias), approximate="tanh").to(x.dtype)


@operator("BiasGelu", domain=_DOMAIN)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact gelu(x + bias)."""
    same_dtype(x, bias)
    return gelu(wide(x) + wide(bias)).to(x.dtype)


@operator("FusedMatMul", domain=_DOMAIN)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """alpha a b. trans swaps the last two dims; transBatch first moves dim 0 to just before the last."""
    same_dtype(a, b)
    x, y = wide(a), wide(b)
    x, y = (x.movedim(0, -2) if transBatchA else x), (y.movedim(0, -2) if transBatchB else y)
    x, y = (x.mT if transA and x.dim() > 1 else x), (y.mT if transB and y.dim() > 1 else y)
    return (alpha * torch.matmul(x, y)).to(a.dtype)
