"""Choosing the next token of each row of logits: greedy, or drawn from a filtered distribution.

A choice depends on its own row alone and repeats exactly, on any device and in any batch: what is summed up over the vocabulary
are whole numbers, which give the same sum in every order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fuser.errors import UsageError
from fuser.runtime.parameters import SamplingParams

Ids = NDArray[np.int64]
UNIT = float(2**40)  # the weight of a row's likeliest token; others are rounded to whole numbers


@dataclass
class Choice:
    """What was chosen for n rows.

    Attributes:
        tokens: [n] int64.
        logprobs: [n] float32, the logarithm of each token's probability; None if no row asks for it.
        top: values [n, k] float32 and token ids [n, k] int64 of the likeliest, falling, of equal ones the lowest id first; k is
            the most that a row asks for (or V). None if no row asks for any.

    Log-probabilities are the model's own: of its logits before penalties, temperature and filters. In rows that do not
    ask for them they are NaN, and ids -1.
    """

    tokens: Tensor
    logprobs: Tensor | None
    top: tuple[Tensor, Tensor] | None


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    u: Tensor,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    banned: Sequence[Sequence[int]] | None = None,
) -> Choice:
    """A token for each row: of the highest logit, the lowest id of equals, or with a temperature drawn by `u`.

    As in transformers, penalties come first, then temperature, top-k (what equals the k-th stays), top-p and min-p. NaN
    counts as -inf; a row without anything above -inf gets token 0.

    Args:
        logits: [n, V], of any floating type; computed in float32, left as they are.
        params: one for each row.
        u: [n] float32 in [0, 1), on the device of the logits; read in rows with a temperature.
        prompts: the prompt's token ids for each row; read in rows with a repetition penalty.
        outputs: the token ids generated so far for each row; read in rows with any penalty.
        banned: token ids for each row that are not chosen, such as end tokens before `min_new_tokens`.

    Raises:
        UsageError: numbers of rows differ, or a penalty comes without its tokens.
    """
    n = len(logits)
    for name, rows in (("params", params), ("u", u), ("prompts", prompts), ("outputs", outputs), ("banned", banned)):
        if rows is not None and len(rows) != n:
            raise UsageError(f"{name} must have a row for each of {n} rows of logits, got {len(rows)}")
    x = logits.float()
    x = torch.where(x.isnan(), -torch.inf, x)
    asking = [row for row, of in enumerate(params) if of.logprobs is not None]
    model = x[asking].log_softmax(-1) if asking else None
    _penalize(x, params, prompts, outputs)
    if banned is not None and any(len(ids) for ids in banned):
        x[_indices(banned, x)] = -torch.inf
    drawing = [row for row, of in enumerate(params) if of.temperature > 0]
    if drawing and len(drawing) == n:
        tokens = _draw(x, params, u)
    else:
        tokens = x.argmax(-1)
        if drawing:
            tokens[drawing] = _draw(x[drawing], [params[row] for row in drawing], u[drawing])
    if model is None:
        return Choice(tokens, None, None)
    logprobs = _among(model.gather(1, tokens[asking, None])[:, 0], asking, n, torch.nan)
    k = min(max(params[row].logprobs or 0 for row in asking), x.shape[1])
    if k == 0:
        return Choice(tokens, logprobs, None)
    values, indices = _highest(model, k)
    return Choice(tokens, logprobs, (_among(values, asking, n, torch.nan), _among(indices, asking, n, -1)))


def uniform(seeds: Sequence[int], steps: Sequence[int]) -> NDArray[np.float32]:
    """Numbers in [0, 1), [n] float32, of a seed (any whole number, modulo 2**64) and a count of tokens each.

    Counted, not drawn one after another: number `step` of the splitmix64 sequence that starts at the mixed seed (Steele et al.,
    "Fast splittable pseudorandom number generators", 2014), so that what a request draws does not depend on its batch.
    """
    start = _mixed(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64))
    count = np.array(steps, dtype=np.uint64) + np.uint64(1)
    drawn = _mixed(start + count * np.uint64(0x9E3779B97F4A7C15))
    return (drawn >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _draw(x: Tensor, params: Sequence[SamplingParams], u: Tensor) -> Tensor:
    """The token [n] of each row of logits [n, V] with which its weights, summed up in order, pass u of their sum."""
    total = _weights(x, params).cumsum(-1)
    wanted = (u.double() * total[:, -1]).long()  # below the sum: 1 - u is at least 2**-24
    found = torch.searchsorted(total, wanted[:, None], right=True)[:, 0]
    return torch.where(found < x.shape[1], found, 0)  # no weight at all


def _weights(x: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [n, V] as int64, in proportion: UNIT for the likeliest token, 0 for what is filtered."""
    V = x.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(x.device)[:, None]

    # Relative to the highest, of which there may be several and which may be inf: nothing overflows at any temperature.
    highest = x.amax(-1, keepdim=True)
    scaled = torch.where(x == highest, 0.0, (x - highest) / column([of.temperature for of in params]).float())
    scaled = scaled.masked_fill(x == -torch.inf, -torch.inf)
    ks = [min(of.top_k or V, V) for of in params]
    if min(ks) < V:
        most = max(k for k in ks if k < V)
        kth = scaled.topk(most).values.gather(1, (column(ks).long() - 1).clamp(max=most - 1))
        scaled = scaled.masked_fill((scaled < kth) & (column(ks) < V), -torch.inf)
    weights = (scaled.exp() * UNIT).round().long()
    if any(of.top_p < 1 for of in params):
        rising, order = scaled.sort(dim=-1, stable=True)
        total = (rising.exp() * UNIT).round().long().cumsum(-1)
        beyond = total <= column([1 - of.top_p for of in params]) * total[:, -1:]
        beyond[:, -1] = False
        weights = weights.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0)
    if any(of.min_p > 0 for of in params):
        weights = weights.masked_fill(scaled.exp() < column([of.min_p for of in params]).float(), 0)
    return weights


def _penalize(
    x: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]] | None,
    outputs: Sequence[Sequence[int]] | None,
) -> None:
    """Logits [n, V], in place, of the tokens that each row has seen: the repetition penalty, then presence and frequency."""
    seen: list[Sequence[int] | Ids] = [()] * len(params)
    changes = []
    for row, of in enumerate(params):
        repeated = of.repetition_penalty != 1
        if not repeated and of.presence_penalty == of.frequency_penalty == 0:
            continue
        if outputs is None or (repeated and prompts is None):
            raise UsageError("penalties need the tokens of outputs, and the repetition penalty those of prompts")
        prompt = prompts[row] if repeated and prompts is not None else ()
        ids, which = np.unique(np.array([*prompt, *outputs[row]], dtype=np.int64), return_inverse=True)
        counts = np.bincount(which[len(prompt) :], minlength=len(ids))[ids < x.shape[1]]
        seen[row] = ids
        costs = of.presence_penalty * (counts > 0) + of.frequency_penalty * counts
        changes.append(np.stack([np.full(len(counts), of.repetition_penalty), costs]))
    if changes:
        where = _indices(seen, x)
        factor, cost = torch.from_numpy(np.concatenate(changes, 1)).float().to(x.device)
        score = x[where]
        changed = torch.where(score < 0, score * factor, score / factor) - cost
        x[where] = changed.where(~changed.isnan(), -torch.inf)


def _indices(tokens: Sequence[Sequence[int] | Ids], x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and token ids, [m] int64 each, of the tokens of each row that x [n, V] has."""
    row = np.repeat(np.arange(len(tokens)), [len(ids) for ids in tokens])
    token = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens])
    rows, columns = torch.from_numpy(np.stack([row, token])[:, token < x.shape[1]]).to(x.device)
    return rows, columns


def _highest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row and their indices, of equal ones the lowest first: compared as whole numbers, all different."""
    bits = (x + 0.0).view(torch.int32).long()  # -0 + 0 is 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    last = torch.arange(x.shape[1], device=x.device).neg() + 0x7FFFFFFF
    indices = 0x7FFFFFFF - (((ordered << 32) | last).topk(k).values & 0xFFFFFFFF)
    return x.gather(1, indices), indices


def _among(values: Tensor, rows: list[int], n: int, filler: float) -> Tensor:
    """`values` of `rows` among n rows, and `filler` in the others."""
    every = values.new_full((n, *values.shape[1:]), filler)
    every[rows] = values
    return every
