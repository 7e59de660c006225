"""Keys and values as int8 codes by groups of channels, each with a scale in float16: what kernels make and read, by torch."""

import torch
from torch import Tensor


def quantized(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Heads [..., Dh] as int8 codes [..., Dh] and scales [..., Dh / group] in float16, computed in float32.

    A group's scale is its largest absolute value / 127, rounded up so that nothing clips; of one that is not finite it is NaN.
    Codes are the nearest to x / scale, ties to even.
    """
    groups = x.float().reshape(*x.shape[:-1], x.shape[-1] // group, group)
    wanted = groups.abs().amax(-1) / 127.0
    scales = wanted.half()
    above = (scales.view(torch.int16) + 1).view(torch.float16)
    scales = torch.where(scales.float() < wanted, above, scales)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    divisors = torch.where(scales > 0, scales.float(), 1.0)
    codes = (groups / divisors[..., None]).nan_to_num(0.0).clamp(-127, 127).round().to(torch.int8)
    return codes.reshape(x.shape), scales


def dequantized(pages: Tensor, scales: Tensor) -> Tensor:
    """What pages of codes [n, page, G, Dh] with scales [n, G, Dh / group, page] stand for, in float32."""
    each = scales.float().permute(0, 3, 1, 2)
    groups = pages.float().reshape(*each.shape, pages.shape[-1] // each.shape[-1])
    return (groups * each[..., None]).reshape(pages.shape)
