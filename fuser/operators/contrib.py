"""ONNX Runtime's own operators (domain com.microsoft), attentions aside: those that its optimizers and fuser write.

Source: docs/ContribOperators.md of ONNX Runtime. SimplifiedLayerNormalization stands in the module of normalizations.
"""

import torch
from torch import Tensor

from fuser.errors import UnsupportedOperator
from fuser.formats import NF4
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


@operator("EmbedLayerNormalization", domain=_DOMAIN)
def embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = float32(1e-12),
    mask_index_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of the sum of word, position and segment embeddings, ids [B, S]; outputs y, the tokens of each sequence
    [B] (0 without a mask) and the sum.
    """
    batch, length = input_ids.shape
    positions = torch.arange(length, device=input_ids.device) if position_ids is None else position_ids
    total = wide(word_embedding[input_ids.long()]) + wide(position_embedding[positions.long()])
    if segment_embedding is not None and segment_ids is not None:
        total = total + wide(segment_embedding[segment_ids.long()])
    y = layer_norm(total, gamma, beta, [-1], epsilon)[0]
    counts = torch.zeros(batch, dtype=torch.int32, device=total.device) if mask is None else mask.sum(1)
    return y.to(gamma.dtype), counts.to(torch.int32), total.to(gamma.dtype)


@operator("MatMulNBits", domain=_DOMAIN)
def matmul_n_bits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    """a [..., K] by a weight [K, N] in blocks along K, each with a scale and a zero point (half the range where absent).

    b uint8 [N, blocks, block_size * bits / 8], the lower bits first; zero points packed alike, or in a's type.
    """
    if bits not in (2, 4, 8) or g_idx is not None or weight_prepacked:
        raise UnsupportedOperator(f"weights of {bits} bits, reordered or packed for a device")
    blocks = -(-K // block_size)
    levels = _unpacked(b.reshape(N, -1), bits).reshape(N, blocks, block_size)
    if zero_points is None:
        zero: Tensor | int = 1 << (bits - 1)
    elif zero_points.dtype == torch.uint8:
        zero = _unpacked(zero_points.reshape(N, -1), bits)[:, :blocks, None]
    else:
        zero = wide(zero_points).reshape(N, blocks, 1)
    weight = (levels - zero) * wide(scales).reshape(N, blocks, 1)
    y = wide(a) @ weight.reshape(N, -1)[:, :K].T
    return (y if bias is None else y + wide(bias)).to(a.dtype)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """uint8 [N, M] as int64 [N, M * 8 / bits], the lower bits first."""
    shifts = torch.arange(0, 8, bits, device=packed.device)
    return ((packed.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


@operator("MatMulBnb4", domain=_DOMAIN)
def matmul_bnb4(
    a: Tensor, b: Tensor, absmax: Tensor, *, K: int, N: int, block_size: int, quant_type: int, training_mode: int = 0,
    transB: int = 1,
) -> Tensor:  # fmt: skip
    """a [..., K] by a weight [K, N] in NF4, stored row after row of its transpose, in blocks that each have a scale.

    b uint8 [ceil(N * K / 2)], the higher four bits first; absmax [ceil(N * K / block_size)].
    """
    if quant_type != 1 or training_mode or not transB:
        raise UnsupportedOperator("weights of four bits that are not NF4, or for training")
    packed = b.reshape(-1)
    levels = torch.tensor(NF4, dtype=torch.float64, device=b.device)
    values = levels[torch.stack([packed >> 4, packed & 15], -1).flatten()[: N * K].long()]
    weight = values * wide(absmax).reshape(-1).repeat_interleave(block_size)[: N * K]
    return (wide(a) @ weight.reshape(N, K).T.to(wide(a).dtype)).to(a.dtype)
