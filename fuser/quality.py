"""How well a model predicts a text, and how near its predictions are to another's: numbers from logits, in float64."""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22  # logits that are worked on at once, in float64


@dataclass(frozen=True)
class Quality:
    """How a model predicts the next tokens of a text; the last three are beside the original's predictions, if there is one.

    Attributes:
        tokens: how many were predicted.
        perplexity: the exponential of their mean negative log-likelihood.
        weights_bytes: of the model's weights, as they are stored.
        kl_mean: mean KL(original || model) of the next token's distribution, in nats.
        kl_p999: its 99.9th percentile: the least value that 99.9% of the tokens do not exceed.
        top1: the share of tokens at which both have the same likeliest one, the first of equal ones.
    """

    tokens: int
    perplexity: float
    weights_bytes: int
    kl_mean: float | None = None
    kl_p999: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Measured:
    """What a quantized model predicts beside its original, and on which text."""

    text: str
    original: Quality
    quantized: Quality

    def to_json(self) -> dict[str, Any]:
        """As reports hold it; a number that is not finite is none."""
        plain: dict[str, Any] = {"text": self.text, "original_perplexity": self.original.perplexity}
        plain |= {name: value for name, value in asdict(self.quantized).items() if name != "weights_bytes"}
        return {
            key: None if isinstance(value, float) and not isfinite(value) else value for key, value in plain.items()
        }

    def __str__(self) -> str:
        found = self.quantized
        return (
            f"perplexity {found.perplexity:.3f} (original {self.original.perplexity:.3f}), mean KL {found.kl_mean:.2e}, "
            f"99.9% KL {found.kl_p999:.2e}, top-1 {found.top1:.2%} of {found.tokens} tokens ({self.text})"
        )


class Measurement:
    """Gathers a row of logits for each predicted token, any number at a time."""

    def __init__(self) -> None:
        self._nats: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._agreed = 0

    def add(self, targets: Tensor, logits: Tensor, original: Tensor | None = None) -> None:
        """Takes tokens [n], the model's logits [n, V] for them, and the original's; with it every time, or never."""
        rows = max(CHUNK // logits.shape[1], 1)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            given = logits[part].double().log_softmax(-1)
            chosen = targets[part].to(given.device).long()
            self._nats.append(-given.gather(1, chosen[:, None])[:, 0].cpu())
            if original is None:
                continue
            wanted = original[part].to(given.device).double().log_softmax(-1)
            share = wanted.exp()
            terms = torch.where(share == 0, 0.0, share * (wanted - given))
            self._kl.append(terms.sum(-1).cpu())
            self._agreed += int((given.argmax(-1) == wanted.argmax(-1)).sum())

    def quality(self, weights_bytes: int) -> Quality:
        """What was gathered, of one token or more."""
        nats = torch.cat(self._nats)
        found = Quality(len(nats), float(nats.mean().exp()), weights_bytes)
        if not self._kl:
            return found
        kl = torch.cat(self._kl)
        return Quality(
            found.tokens, found.perplexity, weights_bytes, float(kl.mean()), percentile(kl, 999), self._agreed / len(kl)
        )


def percentile(values: Tensor, permille: int) -> float:
    """The least of values [n] that at least `permille` thousandths of them do not exceed."""
    return float(values.kthvalue(max(-(-len(values) * permille // 1000), 1)).values)
