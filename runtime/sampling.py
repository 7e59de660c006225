"""Choosing tokens from logits, a row for each sequence; what a row draws depends on that row alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fuser.runtime.parameters import SamplingParams


@dataclass
class Choice:
    """tokens [n]; logprobs [n] float32 of the chosen ones; values and indices [n, k] of the likeliest ones."""

    tokens: Tensor
    logprobs: Tensor | None
    top: tuple[Tensor, Tensor] | None


def sample(
    logits: Tensor, params: Sequence[SamplingParams], u: Tensor, *, prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None, banned: Sequence[Sequence[int]] | None = None,
) -> Choice:  # fmt: skip
    """Tokens for logits [n, V], by each row's parameters and its number u [n], drawn evenly from [0, 1).

    Log-probabilities are the model's own: before penalties and temperature. Of equal logits the first is the highest.
    """
    x = torch.nan_to_num(logits.float(), nan=-torch.inf)
    asked = [p.logprobs for p in params if p.logprobs is not None]
    plain = x.log_softmax(-1) if asked else None
    x = _penalized(x, params, prompts, outputs, banned)
    tokens = _first_highest(x)
    drawn = [i for i, p in enumerate(params) if p.temperature]
    if drawn:
        rows = torch.tensor(drawn, device=x.device)
        chosen = _drawn(x[rows], [params[i] for i in drawn], u[rows])
        tokens = tokens.index_copy(0, rows, chosen)
    if plain is None:
        return Choice(tokens, None, None)
    values, indices = plain.topk(min(max(asked), plain.shape[-1]))
    return Choice(tokens, plain.gather(1, tokens[:, None])[:, 0], (values, indices) if max(asked) else None)


def _first_highest(x: Tensor) -> Tensor:
    return (x == x.max(-1, keepdim=True).values).to(torch.int8).argmax(-1)


def _penalized(
    x: Tensor, params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]] | None,
    outputs: Sequence[Sequence[int]] | None, banned: Sequence[Sequence[int]] | None,
) -> Tensor:  # fmt: skip
    for i, p in enumerate(params):
        output = torch.tensor(list(outputs[i] if outputs else ()), dtype=torch.int64, device=x.device)
        if p.repetition_penalty != 1.0:
            prompt = torch.tensor(list(prompts[i] if prompts else ()), dtype=torch.int64, device=x.device)
            seen = torch.unique(torch.cat([prompt, output]))
            held = x[i, seen]
            x[i, seen] = torch.where(held < 0, held * p.repetition_penalty, held / p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and len(output):
            seen, counts = torch.unique(output, return_counts=True)
            x[i, seen] -= p.presence_penalty + p.frequency_penalty * counts
        if banned and banned[i]:
            x[i, torch.tensor(list(banned[i]), device=x.device)] = -torch.inf
    return x


def _column(values: Sequence[float], x: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=x.device)[:, None]


def _drawn(x: Tensor, params: Sequence[SamplingParams], u: Tensor) -> Tensor:
    """Draws by temperature, top-k, top-p and min-p, one after another."""
    x = x / _column([p.temperature for p in params], x)
    V = x.shape[-1]
    if any(0 < p.top_k < V for p in params):
        ks = torch.tensor([min(p.top_k, V) or V for p in params], device=x.device)
        highest = x.topk(int(max(p.top_k for p in params if p.top_k < V)), -1).values
        least = highest.gather(1, (ks[:, None] - 1).clamp(max=highest.shape[-1] - 1))
        x = torch.where((x < least) & (ks[:, None] < V), -torch.inf, x)
    if any(p.top_p < 1 for p in params):
        values, order = x.sort(dim=-1)
        removed = values.softmax(-1).cumsum(-1) <= 1 - _column([p.top_p for p in params], x)
        removed[:, -1] = False
        removed &= _column([p.top_p for p in params], x) < 1
        x = x.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), -torch.inf)
    p = torch.nan_to_num(x.softmax(-1))
    if any(q.min_p for q in params):
        p = torch.where(p < _column([q.min_p for q in params], x) * p.max(-1, keepdim=True).values, 0.0, p)
    sums = p.double().cumsum(-1)
    place = u.double()[:, None] * sums[:, -1:]
    chosen = torch.searchsorted(sums, place, right=True)[:, 0]
    return torch.where(chosen < V, chosen, _first_highest(x))


def uniform(seeds: Sequence[int], steps: Sequence[int]) -> NDArray[np.float32]:
    """A number in [0, 1) for each seed and step: splitmix64 of both, so that it depends on nothing else."""
    mask = (1 << 64) - 1
    with np.errstate(over="ignore"):
        x = np.array([seed & mask for seed in seeds], np.uint64)
        for more in (np.array(steps, np.uint64), np.uint64(0)):
            x = (x ^ (more * np.uint64(0xD1342543DE82EF95))) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return ((x >> np.uint64(40)).astype(np.float64) / (1 << 24)).astype(np.float32)
