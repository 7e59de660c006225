"""Generated text on a CUDA device: steps captured as graphs, launched before the last one's tokens are read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fuser import LLM, SamplingParams, running
from fuser.stepping import DTYPES
from tests import architectures
from tests.memory import spoiled

pytestmark = pytest.mark.gpu
LENGTHS = (3, 9, 1, 17, 5, 22, 8, 19)
SMALL: dict[str, Any] = {"page_size": 16, "max_length": 64, "max_step_tokens": 16, "max_sequences": 8, "device": "cuda"}
ROOMY: dict[str, Any] = {**SMALL, "max_tokens_in_flight": 1024}


def prompts(vocabulary: int) -> list[list[int]]:
    torch.manual_seed(0)
    made = [torch.randint(1, vocabulary, (length,)).tolist() for length in LENGTHS]
    made[4] = made[3][:16] + made[4]
    return made


@pytest.mark.parametrize("tokens", [512, 64])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "bloom"])
def test_greedy_tokens_are_those_of_transformers(name: str, tokens: int) -> None:
    """In float32; the smaller pool forces sequences to be computed again."""
    model: Any = architectures.model(name).cuda()
    llm = LLM(model, max_tokens_in_flight=tokens, **SMALL)
    if llm.padded is None:
        spoiled(llm)
    given = prompts(llm.runner.vocabulary)
    found = llm.generate(given, SamplingParams(max_new_tokens=12, ignore_eos=True))
    for prompt, result in zip(given, found, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert result.token_ids == wanted[0, len(prompt) :].tolist()
    llm.engine.pool.check([])
    if llm.padded is None:
        assert llm.runner.captured  # type: ignore[attr-defined]
        assert llm.engine.scheduler.reused > 0
    assert (llm.engine.scheduler.preemptions > 0) == (tokens == 64)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_steps_of_one_token_do_not_depend_on_who_is_beside(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, within a bucket: prompts of one token are such steps from the beginning."""
    monkeypatch.setattr(running, "BUCKETS", (8, 64))
    model = architectures.model("llama").cuda()

    def logits(asked: list[list[int]]) -> list[list[Tensor]]:
        llm = LLM(model, dtype=dtype, prefix_caching=False, **ROOMY)
        found: list[list[Tensor]] = [[] for _ in asked]
        run = llm.runner.run

        def noted(step: Any) -> Any:
            made = run(step)
            assert step.decode
            for i, values in enumerate(made[0]):
                found[i].append(values.clone())
            return made

        llm.runner.run = noted  # type: ignore[method-assign]
        llm.generate(asked, SamplingParams(max_new_tokens=10, ignore_eos=True))
        return found

    given = [[token] for token in (5, 17, 2, 9, 31, 44, 8)]
    together = logits(given)
    for i, prompt in enumerate(given):
        alone = logits([prompt])[0]
        assert len(alone) >= 10
        for a, b in zip(alone[:10], together[i][:10], strict=True):
            assert torch.equal(a, b)


def test_drawn_tokens_repeat() -> None:
    given = prompts(architectures.V)
    params = SamplingParams(max_new_tokens=10, temperature=1.1, top_k=40, top_p=0.9, seed=3, n=2, logprobs=2)
    first, second = (
        LLM(architectures.model("qwen2").cuda(), dtype="bf16", **ROOMY).generate(given, params) for _ in "ab"
    )
    assert [r.token_ids for r in first] == [r.token_ids for r in second]
    assert all(r.logprobs is not None and len(r.logprobs) == len(r.token_ids) for r in first)
    assert len({tuple(r.token_ids) for r in first}) > len(given)


def test_a_bound_on_memory_of_graphs_leaves_steps_uncaptured() -> None:
    llm = LLM(architectures.model("llama").cuda(), **ROOMY)
    llm.runner.graph_bytes = 0  # type: ignore[attr-defined]
    given = prompts(llm.runner.vocabulary)
    whole = LLM(architectures.model("llama").cuda(), **ROOMY)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    assert [r.token_ids for r in llm.generate(given, params)] == [r.token_ids for r in whole.generate(given, params)]
    assert not llm.runner.captured  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2"])
def test_keys_and_values_of_int8(name: str, dtype: str) -> None:
    """Scores of every token are nearly those of the float cache, in chunks, beside others, and where pages are shared."""
    given = prompts(LLM(architectures.model(name).cuda(), **ROOMY).runner.vocabulary)
    scores = []
    for kind in ("auto", "int8"):
        llm = LLM(architectures.model(name).cuda(), dtype=dtype, kv_cache=kind, **ROOMY)
        spoiled(llm)
        scores.append(torch.tensor([p for scored in llm.score(given) for p in scored.logprobs]))
        first, second = (llm.generate(given, SamplingParams(max_new_tokens=12, ignore_eos=True)) for _ in "ab")
        assert all(len(a.token_ids) == len(b.token_ids) == 12 for a, b in zip(first, second, strict=True))
        llm.engine.pool.check([])
    rounded = torch.finfo(DTYPES[dtype]).eps / 2 * float(scores[0].abs().mean())  # what the logits' own type costs
    assert float((scores[0] - scores[1]).abs().mean()) < 2e-2 + rounded


@pytest.mark.parametrize("quantization", ["int4", "int8:64:asymmetric", "nf4", "w8a8", "fp8"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_quantized_weights(name: str, quantization: str) -> None:
    """Scores are those of the quantized module in float32; steps are CUDA graphs of kernels that read codes."""
    module = architectures.model(name).cuda()
    llm = LLM(module, dtype="bf16", quantization=quantization, prefix_caching=False, **ROOMY)
    spoiled(llm)
    given = prompts(llm.runner.vocabulary)
    found = torch.tensor([p for scored in llm.score(given) for p in scored.logprobs])
    plain = LLM(module, dtype="fp32", quantization=quantization, **(ROOMY | {"device": "cpu"}))
    expected = torch.tensor([p for scored in plain.score(given) for p in scored.logprobs])
    rounded = torch.finfo(torch.bfloat16).eps * float(expected.abs().mean())
    assert float((found - expected).abs().mean()) < 3e-2 + rounded
    first, second = (llm.generate(given, SamplingParams(max_new_tokens=12, ignore_eos=True)) for _ in "ab")
    assert [a.token_ids for a in first] == [b.token_ids for b in second]
    steps = llm.runner.stepper.program(1, decode=True).steps  # type: ignore[attr-defined]
    assert any(getattr(step.what, "format", None) is not None for step in steps)
