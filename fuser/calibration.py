"""Codes that cost a model less than the nearest ones: scales that clip, errors that later weights make good.

Functions of a weight [N, K], and of its inputs' second moment H = sum of x x^T [K, K] over tokens.
"""

import torch
from torch import Tensor

from fuser.errors import InputError
from fuser.formats import Format
from fuser.quantized import Codes, decode, doubled, encode, pack, scales_of

# What a group's range is multiplied with, of which the factor with the least squared error is taken.
FACTORS = tuple(percent / 100 for percent in range(100, 49, -1))
BLOCK_ELEMENTS = 1 << 22  # of a weight, that are tried at once
DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns whose errors are spread at once


def clipped(weight: Tensor, format: Format, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros, as `scales_of` gives them, of ranges cut to what makes each group's squared error least.

    Args:
        weight: [N, K].
        importance: of each input [K], what its squared errors are weighed with, or of any two of a group, what the product
            of their errors is, [groups, group, group]; by default all inputs count alike.

    Raises:
        InputError: a weight is not finite.
    """
    N, K = weight.shape
    group = format.grouped(K)
    rows = max(BLOCK_ELEMENTS // max(K, 1), 1)
    factors = torch.cat([_factors(weight[start : start + rows], format, importance) for start in range(0, N, rows)])
    return scales_of(weight.float() * factors.repeat_interleave(group, 1)[:, :K], format)


def _factors(weight: Tensor, format: Format, importance: Tensor | None) -> Tensor:
    """The best factor of each group [N, groups], of equal ones the largest."""
    N, K = weight.shape
    group = format.grouped(K)
    least = torch.full((N, format.groups(K)), torch.inf, device=weight.device)
    best = torch.ones_like(least)
    for factor in FACTORS:
        scales, zeros = scales_of(weight.float() * factor, format)
        error = decode(encode(weight, scales, zeros, format), scales, zeros, format) - weight
        if importance is not None and importance.dim() == 1:
            error = error * importance.sqrt()
        errors = torch.nn.functional.pad(error, (0, -K % group)).reshape(N, -1, group)
        if importance is not None and importance.dim() == 3:
            total = (torch.einsum("ngi,gij->ngj", errors, importance) * errors).sum(-1)
        else:
            total = errors.square().sum(-1)
        best = torch.where(total < least, factor, best)
        least = torch.minimum(total, least)
    return best


def gptq(weight: Tensor, factor: Tensor, format: Format, importance: Tensor | None = None) -> Codes:
    """Codes by GPTQ (arXiv:2210.17323): column after column is rounded, and what that changes in the outputs is taken off them
    again by the columns that are still to come. A group's scale is chosen when its first column's turn comes.

    Args:
        weight: [N, K].
        factor: `inverse_factor` of the inputs' second moment.
        importance: as of `clipped`.

    Raises:
        InputError: a weight is not finite.
    """
    N, K = weight.shape
    left, factor = weight.float().clone(), factor.to(weight.device, torch.float32)
    group = format.grouped(K)
    block = group if format.group else min(BLOCK, K)
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for start in range(0, K, block):
        stop = min(start + block, K)
        errors = torch.empty(N, stop - start, device=weight.device)
        for k in range(start, stop):
            if k % group == 0:
                span = slice(k, min(k + group, K))
                scale, zero = clipped(left[:, span], format, None if importance is None else importance[span])
                scales.append(scale)
                zeros += [] if zero is None else [zero]
            column, zero = left[:, k : k + 1], zeros[-1] if zeros else None
            codes[:, k : k + 1] = encode(column, scales[-1], zero, format)
            error = (column - decode(codes[:, k : k + 1], scales[-1], zero, format)) / factor[k, k]
            left[:, k + 1 : stop] -= error * factor[k, k + 1 : stop]
            errors[:, k - start] = error[:, 0]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    found, held = torch.cat(scales, 1), None
    if format.double:
        held = doubled(found)  # codes stay: what their scales lose is little beside what they lose
        found = held.scales()
    return Codes(pack(codes, format), found, torch.cat(zeros, 1) if zeros else None, format, K, held)


def inverse_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor of the inverse of a second moment [K, K], float64; inputs that are always zero stand alone.

    Damping is a share of the diagonal's mean; where that is too little it is made ten times as much, until it is enough.

    Raises:
        InputError: the moment is not finite.
    """
    if not moment.isfinite().all():
        raise InputError("calibration: inputs of a product are not finite, or too large")
    held = moment.double().clone()
    diagonal = held.diagonal()
    diagonal[diagonal == 0] = 1
    added = damping * diagonal.mean()
    while True:
        diagonal += added
        lower, failed = torch.linalg.cholesky_ex(held)
        if not failed:
            break
        added = 10 * added
    inverse: Tensor = torch.cholesky_inverse(lower)
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
