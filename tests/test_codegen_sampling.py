"""Choosing tokens: the highest logits exactly, and draws of the right probabilities."""

from tests.interpreter import DEVICE  # isort: skip

import pytest
import torch
from torch import Tensor

from fuser.codegen.sampling import Top, draw, top
from fuser.errors import UsageError
from tests.test_codegen_kernels import DTYPES, _cache_folder, drawn, launch, unwritten  # noqa: F401


def highest(
    logits: Tensor,
    k: int,
    dtype: str,
    *,
    temperature: float = 1.0,
    BLOCK: int | None = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, V = logits.shape
    heat = torch.full((rows,), temperature, device=DEVICE)
    values, normalizer = unwritten(rows, k, dtype="fp32"), unwritten(rows, dtype="fp32")
    indices = torch.full((rows, k), -1, dtype=torch.int32, device=DEVICE)
    what = Top(V, k, seeds is not None, dtype)
    noise = [] if seeds is None else [seeds]
    launch(top(what, BLOCK=BLOCK), logits, heat, *noise, values, indices, normalizer, sequences=rows)
    return values, indices, normalizer


@pytest.mark.parametrize(
    ("dtype", "V", "k", "BLOCK"),
    [(dtype, *sizes) for dtype in DTYPES for sizes in ((7, 1, None), (100, 1, 32), (100, 5, 32))]
    + [("fp32", 150, 32, 32), ("bf16", 300, 200, None)],
)
def test_the_highest(dtype: str, V: int, k: int, BLOCK: int | None) -> None:
    logits = drawn(2, V, dtype=dtype, scale=4.0)
    values, indices, normalizer = highest(logits, k, dtype, temperature=0.7, BLOCK=BLOCK)
    scaled = logits.double() / 0.7
    order = scaled.sort(dim=1, descending=True, stable=True).indices[:, :k]  # of equal ones the first
    assert torch.equal(indices.long(), order)
    assert torch.allclose(values.double(), scaled.gather(1, order), rtol=1e-6)
    assert torch.allclose(normalizer.double(), scaled.logsumexp(1), rtol=1e-5)


def test_ties_nan_and_infinities() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, nan, -inf], [nan] * 5, [-inf] * 5, [-0.0, 0.0, -2.0, -inf, nan]], device=DEVICE
    )
    _, indices, _ = highest(logits, 2, "fp32", BLOCK=2)
    assert indices.tolist() == [[1, 2], [0, 1], [0, 1], [0, 1]]


def drawn_tokens(logits: Tensor, u: Tensor, **settings: float) -> tuple[Tensor, Tensor]:
    """Tokens for one row of logits, one for each u."""
    rows, k = len(u), min(logits.shape[-1], 64)
    temperature = settings.get("temperature", 1.0)
    of_one = highest(logits, k, "fp32", temperature=temperature)
    values, indices, normalizer = (x.expand(rows, *x.shape[1:]).contiguous() for x in of_one)
    given = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    columns = [
        torch.full((rows,), value, dtype=torch.int32 if name == "top_k" else torch.float32, device=DEVICE)
        for name, value in given.items()
    ]
    token, logprob = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE), unwritten(rows, dtype="fp32")
    launch(draw(k), values, indices, normalizer, u, *columns, token, logprob)
    return token, logprob


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.7, "min_p": 0.1, "temperature": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_draw_has_the_probabilities_of_what_is_kept(settings: dict[str, float]) -> None:
    """u at the middle of 50 equal steps: each token is drawn as often as its probability says, within a step at each end."""
    logits = drawn(1, 12, dtype="fp32", scale=2.0)
    u = (torch.arange(50, device=DEVICE) + 0.5) / 50
    tokens, logprobs = drawn_tokens(logits, u, **settings)
    p = (logits[0].double() / settings.get("temperature", 1.0)).softmax(0)
    expected = p.clone()
    if "top_k" in settings:
        expected[p < p.topk(int(settings["top_k"])).values[-1]] = 0
        expected /= expected.sum()
    order = expected.argsort(descending=True)
    before = expected[order].cumsum(0) - expected[order]
    expected[order[before >= settings.get("top_p", 1.0)]] = 0
    expected[expected < settings.get("min_p", 0.0) * expected.max()] = 0
    expected /= expected.sum()
    counts = torch.bincount(tokens.long(), minlength=12).double() / 50
    assert ((counts - expected).abs() <= 1 / 50 + 1e-6).all()
    assert torch.allclose(logprobs.double(), p.log()[tokens.long()], atol=1e-5)  # of all the vocabulary


def test_temperature_0_takes_the_highest() -> None:
    logits = drawn(1, 40, dtype="fp32")
    tokens, _ = drawn_tokens(logits, torch.rand(5, device=DEVICE), temperature=0.0)
    assert (tokens == int(logits.argmax())).all()


def test_noise_draws_from_all_of_the_vocabulary() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], device=DEVICE).expand(100, -1).contiguous()
    values, indices, normalizer = highest(logits, 1, "fp32", seeds=torch.arange(100, dtype=torch.int32, device=DEVICE))
    counts = torch.bincount(indices[:, 0].long(), minlength=4).double() / 100
    p = logits[0].double().softmax(0)
    assert (counts - p).abs().max() < 4 * (0.25 / 100) ** 0.5  # four standard deviations
    assert torch.equal(values, logits.gather(1, indices.long()))  # without the noise
    assert torch.allclose(normalizer.double(), logits.double().logsumexp(1), rtol=1e-6)


def test_too_many_candidates_are_refused() -> None:
    with pytest.raises(UsageError, match="1 to 256"):
        top(Top(1000, 257))
    with pytest.raises(UsageError, match="1 to 10 candidates"):
        top(Top(10, 11))
    with pytest.raises(UsageError, match="1 to 256"):
        draw(0)
