"""Sampling: distributions as transformers filters them, draws that repeat alone and among others, parameters refused by name."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fuser.errors import UsageError
from fuser.runtime.parameters import SamplingParams
from fuser.runtime.sampling import sample, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
GRID = 4096


def drawn(n: int, V: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(uniform([seed] * n, range(n))).to(DEVICE)


def greedy(logits: list[list[float]], **of: Any) -> list[int]:
    """The tokens of rows that all have the same parameters; `prompts`, `outputs` and `banned` go to `sample`."""
    tokens = {name: of.pop(name) for name in ("prompts", "outputs", "banned") if name in of}
    x = torch.tensor(logits, device=DEVICE)
    return sample(x, [SamplingParams(**of)] * len(x), uniforms(len(x)), **tokens).tokens.tolist()


def shares(logits: Tensor, params: SamplingParams, **tokens: list[int]) -> Tensor:
    """[V]: how often each token is drawn from a row of logits [V], over a grid of u."""
    u = torch.arange(GRID, device=DEVICE) / GRID
    rows = {name: [ids] * GRID for name, ids in tokens.items()}
    chosen = sample(logits.expand(GRID, -1), [params] * GRID, u, **rows).tokens
    return torch.bincount(chosen, minlength=len(logits)) / GRID


def of_transformers(logits: Tensor, params: SamplingParams, seen: list[int], dtype: torch.dtype) -> Tensor:
    """[V]: the probabilities after transformers' own processors, in the order of its `generate`."""
    ids, scores = torch.tensor([seen]), logits.cpu().to(dtype)[None]
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores[0].softmax(-1).to(DEVICE)


@settings(max_examples=120, deadline=None)
@given(
    # Quarters, so that many are equal; at most 16, of which torch's sort (on CPUs, without `stable`) leaves equal ones in order.
    quarters=st.lists(st.integers(-24, 24), min_size=1, max_size=16),
    seen=st.lists(st.integers(0, 15), min_size=1, max_size=6),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 30),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.2, 4)),
)
def test_distributions_are_those_of_transformers(quarters: list[int], seen: list[int], **of: Any) -> None:
    logits, params = torch.tensor(quarters, device=DEVICE) / 4, SamplingParams(**of)
    seen = [token % len(quarters) for token in seen]
    expected = of_transformers(logits, params, seen, torch.float64)
    single = of_transformers(logits, params, seen, torch.float32)
    assume(torch.equal(expected > 0, single > 0))  # no token stands so near a bound that rounding decides
    found = shares(logits, params, prompts=seen[:2], outputs=seen[2:])
    assert (found - expected).abs().max() <= 1.001 / GRID
    assert not found[expected == 0].any()


def test_ties_at_the_bounds() -> None:
    """What equals the k-th stays; of equals at top-p's bound, the last stay."""
    logits = torch.zeros(1000, device=DEVICE)
    assert shares(logits, SamplingParams(temperature=1.0, top_k=3)).all()
    half = shares(logits, SamplingParams(temperature=1.0, top_p=0.5))
    assert not half[:500].any() and half[500:].all()
    assert shares(logits, SamplingParams(temperature=1.0, min_p=1.0)).all()


@pytest.mark.parametrize(
    "of",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_have_their_probabilities(of: dict[str, Any]) -> None:
    """Pearson's chi-square of 20000 draws, five standard deviations above its mean at most."""
    n, params = 20_000, SamplingParams(**{"temperature": 1.0} | of)
    logits = drawn(1, 30, scale=1.5)[0]
    counts = torch.bincount(sample(logits.expand(n, -1), [params] * n, uniforms(n, seed=5)).tokens, minlength=30)
    expected = of_transformers(logits, params, [0], torch.float64) * n
    assert not counts[expected == 0].any()
    kept = expected > 0
    distance = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert freedom >= 3 and distance < freedom + 5 * math.sqrt(2 * freedom)


def test_a_row_chooses_alone_what_it_chooses_among_others() -> None:
    V, n = 1031, 24
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.5, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.7, "logprobs": 3},
        {"temperature": 1.2, "min_p": 0.02, "presence_penalty": 0.5},
        {"temperature": 3.0, "top_k": 900, "top_p": 0.99, "repetition_penalty": 1.3, "frequency_penalty": -0.2},
    ]
    logits, u = drawn(n, V), uniforms(n)
    params = [SamplingParams(**kinds[row % len(kinds)]) for row in range(n)]
    ids = [[(row * 7 + i * i) % V for i in range(row % 5 + 1)] for row in range(n)]
    among = sample(logits, params, u, prompts=ids, outputs=ids, banned=ids)
    for row in range(n):
        one = slice(row, row + 1)
        of = {"prompts": ids[one], "outputs": ids[one], "banned": ids[one]}
        for x in (logits[one], logits[one].clone()):
            alone = sample(x, params[one], u[one], **of)
            assert torch.equal(alone.tokens, among.tokens[one])


def test_draws_at_the_bounds_do_not_move() -> None:
    """Where independence of other rows is hardest: at the very u where one token ends and the next begins, and next to it."""
    V, n = 257, 6
    params = SamplingParams(temperature=1.1, top_p=0.95)
    logits = drawn(n, V, seed=3)

    def chosen(steps: list[int], rows: Tensor) -> list[int]:
        u = torch.tensor(steps, device=DEVICE) / 2**24
        return sample(rows, [params] * len(steps), u).tokens.tolist()

    bounds = []
    for row in range(n):
        low, high = 0, 2**24 - 1  # the token of u = 1 / 2 begins between them
        begins = chosen([2**23], logits[row : row + 1])[0]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if chosen([middle], logits[row : row + 1])[0] < begins else (low, middle)
        bounds.append(high)
    for offset in (-1, 0, 1):
        steps = [bound + offset for bound in bounds]
        alone = [chosen([step], logits[row : row + 1].clone())[0] for row, step in enumerate(steps)]
        assert chosen(steps, logits) == alone == chosen(steps[::-1], logits.flip(0))[::-1]


def test_the_highest_number_takes_the_last_token() -> None:
    u = torch.tensor([1 - 2**-24], device=DEVICE)
    assert sample(torch.zeros(1, 1000, device=DEVICE), [SamplingParams(temperature=1.0)], u).tokens.tolist() == [999]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_left_as_it_is(dtype: torch.dtype) -> None:
    logits = drawn(3, 50).to(dtype)
    before = logits.clone()
    params = [SamplingParams(temperature=t, presence_penalty=1.0, logprobs=2) for t in (0.0, 0.5, 1.0)]
    found = sample(logits, params, uniforms(3), outputs=[[1]] * 3, banned=[[2]] * 3)
    same = sample(logits.float(), params, uniforms(3), outputs=[[1]] * 3, banned=[[2]] * 3)
    assert torch.equal(logits, before) and torch.equal(found.tokens, same.tokens)
    assert found.tokens.dtype == torch.int64 and found.logprobs is not None and found.logprobs.dtype == torch.float32


def test_greedy_takes_the_first_of_equals() -> None:
    assert greedy([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-INF, -2.0, -INF, -2.0]]) == [1, 0, 1]
    logits = torch.zeros(2, 1000, device=DEVICE)
    logits[0, [400, 900]] = 5.0
    assert sample(logits, [SamplingParams()] * 2, uniforms(2)).tokens.tolist() == [400, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    rows = [[NAN, 1.0, NAN], [NAN] * 3, [-INF] * 3, [NAN, -INF, -INF], [0.0, INF, 5.0], [-INF, NAN, -1e38]]
    for of in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"logprobs": 2}):
        assert greedy(rows, temperature=temperature, **of) == [1, 0, 0, 0, 1, 2]
    tokens = greedy([[-3e38, 3e38, 3e38]] * 50, temperature=temperature)
    assert set(tokens) == ({1} if temperature == 0 else {1, 2})


@pytest.mark.parametrize("temperature", [1e-300, 1e-42, 1e-5, 3e38])
def test_extreme_temperatures(temperature: float) -> None:
    tokens = greedy([[1.0, 9.0, -INF, 8.0]] * 60, temperature=temperature)
    assert set(tokens) == ({0, 1, 3} if temperature > 1 else {1})


def test_no_rows_and_a_single_token() -> None:
    empty = sample(torch.empty(0, 7, device=DEVICE), [], uniforms(0), banned=[])
    assert empty.tokens.shape == (0,) and empty.logprobs is None and empty.top is None
    assert greedy([[2.0]], temperature=1.0, top_k=3, top_p=0.5, min_p=1.0) == [0]


def test_penalties_by_hand() -> None:
    logits = [[2.0, 1.9, -1.0, -1.5]]
    assert greedy(logits) == [0]
    assert greedy(logits, repetition_penalty=2.0, prompts=[[0]], outputs=[[]]) == [1]
    assert greedy([[-1.0, -1.5]], repetition_penalty=2.0, prompts=[[]], outputs=[[0, 0]]) == [1]  # -2, once for both
    assert greedy(logits, presence_penalty=0.2, outputs=[[0, 0]]) == [1]
    assert greedy(logits, presence_penalty=0.05, outputs=[[0, 0, 0]]) == [0]  # once, however often
    assert greedy(logits, frequency_penalty=0.05, outputs=[[0]]) == [0]
    assert greedy(logits, frequency_penalty=0.05, outputs=[[0, 0, 0]]) == [1]
    assert greedy(logits, presence_penalty=1.0, prompts=[[0]], outputs=[[]]) == [0]  # of the output alone
    assert greedy([[0.0, -9.0]], frequency_penalty=-10.0, outputs=[[1]]) == [1]
    # 2 / 1.25 - 0.1 - 2 * 0.1 = 1.3, and 1.4 / 1.25 = 1.12
    both = {"repetition_penalty": 1.25, "presence_penalty": 0.1, "frequency_penalty": 0.1, "prompts": [[1]]}
    assert greedy([[2.0, 1.4, 1.29]], **both, outputs=[[0, 0]]) == [0]
    assert greedy([[2.0, 1.4, 1.31]], **both, outputs=[[0, 0]]) == [2]
    assert greedy([[0.0, -1.0]], repetition_penalty=1e-300, prompts=[[0]], outputs=[[]]) == [1]  # 0 / 0 is not chosen
    assert greedy([[1.0, 2.0]], frequency_penalty=5.0, outputs=[[1, 2, 900]], banned=[[77]]) == [0]  # ids beyond V


def test_penalties_need_their_tokens() -> None:
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        with pytest.raises(UsageError, match="need the tokens of outputs"):
            greedy([[1.0]], **{name: 0.5})
    with pytest.raises(UsageError, match="those of prompts"):
        greedy([[1.0]], repetition_penalty=0.5, outputs=[[]])


@pytest.mark.parametrize("name", ["params", "u", "prompts", "outputs", "banned"])
def test_a_row_for_each(name: str) -> None:
    rows: dict[str, Any] = {"params": [SamplingParams()] * 2, "u": uniforms(2)}
    rows[name] = [[]] if name not in rows else rows[name][:1]
    with pytest.raises(UsageError, match=f"^{name} must have a row for each of 2 rows of logits, got 1$"):
        sample(drawn(2, 4), **rows)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_banned_tokens_are_not_chosen(temperature: float) -> None:
    logits = drawn(200, 6)
    banned = [[row % 6, (row + 1) % 6] for row in range(200)]
    tokens = sample(logits, [SamplingParams(temperature=temperature)] * 200, uniforms(200), banned=banned).tokens
    assert all(token not in ids for token, ids in zip(tokens.tolist(), banned, strict=True))
    assert greedy([[1.0, 5.0, 2.0]], frequency_penalty=-9.0, outputs=[[1]], banned=[[1]]) == [2]


def test_logprobs_are_the_models_own() -> None:
    logits = drawn(4, 40)
    logits[0, [3, 9, 20]] = 50.0  # equal ones: the lowest first
    expected = logits.log_softmax(-1)
    params = [
        SamplingParams(logprobs=2),
        SamplingParams(),
        SamplingParams(temperature=0.3, top_k=5, repetition_penalty=3.0, logprobs=0),
        SamplingParams(temperature=2.0, frequency_penalty=1.0, logprobs=4),
    ]
    found = sample(logits, params, uniforms(4), prompts=[[1]] * 4, outputs=[[2, 2]] * 4, banned=[[3]] * 4)
    assert found.logprobs is not None and found.top is not None
    values, indices = found.top
    assert values.shape == indices.shape == (4, 4) and indices[0, :3].tolist() == [3, 9, 20]
    assert found.logprobs[1].isnan() and values[1].isnan().all() and indices[1].tolist() == [-1] * 4
    for row in (0, 2, 3):
        assert torch.allclose(found.logprobs[row], expected[row, found.tokens[row]], atol=1e-6)
        assert torch.allclose(values[row], expected[row].topk(4).values, atol=1e-6)
        assert torch.allclose(values[row], expected[row, indices[row]], atol=1e-6)
    few = sample(logits[:, :3], [SamplingParams(logprobs=7)] * 4, uniforms(4)).top
    assert few is not None and few[0].shape == (4, 3)
    assert sample(logits, [SamplingParams(logprobs=0)] * 4, uniforms(4)).top is None


def test_uniform_numbers() -> None:
    seeds, steps = np.meshgrid(np.arange(-50, 50), np.arange(400), indexing="ij")
    u = uniform(seeds.ravel().tolist(), steps.ravel().tolist())
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    counts = np.bincount((u * 100).astype(int), minlength=100)
    assert ((counts - 400) ** 2 / 400).sum() < 99 + 5 * math.sqrt(2 * 99)
    grid = u.reshape(100, 400) - 0.5
    for other in (np.roll(grid, 1, 0), np.roll(grid, 1, 1), np.roll(grid, (1, 1), (0, 1))):
        assert abs((grid * other).mean()) < 5 / 12 / math.sqrt(grid.size)
    assert len(np.unique(u)) > 0.99 * u.size


def test_uniform_numbers_depend_on_seed_and_step_alone() -> None:
    seeds, steps = [3, -1, 2**70 + 3, 3], [0, 9, 0, 10_000]
    together = uniform(seeds, steps)
    assert together.tolist() == [uniform([seed], [step])[0] for seed, step in zip(seeds, steps, strict=True)]
    assert together[0] == together[2] != together[3]  # seeds are taken modulo 2**64
    assert uniform([], []).shape == (0,)
    assert uniform([0, 1], [0, 1]).tolist() == uniform([0, 1], [0, 1]).tolist()


REFUSED: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in (0, -1, True, 1.0, "5", None, NAN)),
    *(("min_new_tokens", value) for value in (-1, False, 0.5)),
    *(("temperature", value) for value in (NAN, INF, -0.1, "hot", True, None, 10**400)),
    *(("top_k", value) for value in (-1, 2.0, True, None)),
    *(("top_p", value) for value in (0, 0.0, -0.1, 1.01, NAN, None)),
    *(("min_p", value) for value in (-0.1, 1.1, NAN, None)),
    *(("repetition_penalty", value) for value in (0, -1.0, INF, NAN, None)),
    *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (INF, -INF, NAN, "1", None)),
    *(("seed", value) for value in (1.0, "1", True)),
    *(("ignore_eos", value) for value in (0, None)),
    *(("logprobs", value) for value in (-1, 257, True, 1.0)),
    *(("n", value) for value in (0, -2, 1.5, True, None)),
    *(("stop", value) for value in ("", ["a", ""], -1, [3, -3], [True], True, None, b"end", [b"end"], {"a"}, 1.5, [None])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: repr(value)[:12])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{name} must be .+, got ") as refusal:
        SamplingParams(**{name: value})
    shown = value if not isinstance(value, list) else value[-1]
    assert str(refusal.value).endswith(f"got {shown!r}")


def test_the_least_number_is_at_most_the_most() -> None:
    with pytest.raises(UsageError, match="^min_new_tokens must be at most max_new_tokens, 4, got 5$"):
        SamplingParams(max_new_tokens=4, min_new_tokens=5)
    assert SamplingParams(max_new_tokens=4, min_new_tokens=4).min_new_tokens == 4


def test_stops_are_strings_and_tokens() -> None:
    assert SamplingParams().stop == ()
    one, other = SamplingParams(stop="end"), SamplingParams(stop=0)
    assert (one.stop_strings, one.stop_tokens, other.stop_strings, other.stop_tokens) == (("end",), (), (), (0,))
    several = SamplingParams(stop=["a", 7, np.int64(8), "b"])
    assert several.stop_strings == ("a", "b") and several.stop_tokens == (7, 8)
    assert SamplingParams(stop=["a", 7]) == SamplingParams(stop=("a", 7)) and hash(several)
    assert SamplingParams(top_k=np.int32(4), temperature=np.float32(0.5), seed=-(2**80), logprobs=256).logprobs == 256


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"max_new_tokens": 20}),
        ({"max_new_tokens": 7, "max_length": 99}, {"max_new_tokens": 7}),
        ({"max_length": 25}, {"max_new_tokens": 15}),
        ({"min_new_tokens": 3}, {"max_new_tokens": 20, "min_new_tokens": 3}),
        ({"min_length": 16}, {"max_new_tokens": 20, "min_new_tokens": 6}),
        ({"min_length": 6}, {"max_new_tokens": 20}),
        ({"temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, {"max_new_tokens": 20}),  # do_sample is not set
        ({"do_sample": True}, {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.5, "min_p": 0.1},
            {"max_new_tokens": 20, "temperature": 0.7, "top_p": 0.5, "min_p": 0.1},
        ),
        ({"repetition_penalty": 1.2}, {"max_new_tokens": 20, "repetition_penalty": 1.2}),
        ({"do_sample": True, "num_return_sequences": 3}, {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "n": 3}),
        ({"eos_token_id": 2}, {"max_new_tokens": 20, "stop": 2, "ignore_eos": True}),
        ({"eos_token_id": [2, 0], "stop_strings": "x"}, {"max_new_tokens": 20, "stop": ("x", 2, 0), "ignore_eos": True}),
        (
            {"eos_token_id": torch.tensor([5]), "stop_strings": ["x", "y"]},
            {"max_new_tokens": 20, "stop": ("x", "y", 5), "ignore_eos": True},
        ),
        ({"num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "no_repeat_ngram_size": 0}, {"max_new_tokens": 20}),
        ({"typical_p": 0.5}, {"max_new_tokens": 20}),  # a filter of draws
        ({"bos_token_id": 1, "pad_token_id": 0, "use_cache": False}, {"max_new_tokens": 20}),
        ({"chat_format": "chatml"}, {"max_new_tokens": 20}),  # transformers does not know it, either
    ],
    ids=str,
)  # fmt: skip
def test_configurations_of_transformers(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert SamplingParams.of(GenerationConfig(**config), 10) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p"),
        ({"do_sample": True, "epsilon_cutoff": 0.01}, "epsilon_cutoff"),
        ({"do_sample": True, "eta_cutoff": 0.01}, "eta_cutoff"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"sequence_bias": [[[3], 1.0]]}, "sequence_bias"),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"begin_suppress_tokens": [3]}, "begin_suppress_tokens"),
        ({"forced_bos_token_id": 0}, "forced_bos_token_id"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id"),
        ({"exponential_decay_length_penalty": (3, 1.1)}, "exponential_decay_length_penalty"),
        ({"encoder_repetition_penalty": 1.1}, "encoder_repetition_penalty"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"remove_invalid_values": True}, "remove_invalid_values"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"max_time": 3.0}, "max_time"),
        ({"max_length": 10}, "max_length"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=rf"^{named} "):
        SamplingParams.of(GenerationConfig(**config), 10)


def test_parameters_load_no_libraries() -> None:
    program = "import sys, fuser.runtime.parameters; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
