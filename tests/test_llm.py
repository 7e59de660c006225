"""Generated text: token for token what transformers generates, whoever is beside it; requests in every state."""

import asyncio
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fuser
from fuser import LLM, SamplingParams, running
from fuser.errors import UnsupportedOperator, UsageError
from tests import architectures, zoo
from tests.memory import spoiled

DEMO = Path(__file__).parents[1] / "models/demo"
NEW = 12
LENGTHS = (3, 9, 1, 17, 5, 22, 8, 19)
SMALL: dict[str, Any] = {"page_size": 4, "max_length": 64, "max_step_tokens": 16, "max_sequences": 8, "device": "cpu"}


@functools.cache
def module(name: str) -> Any:
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(DEMO)
    return architectures.model(name)


@functools.cache
def prompts(vocabulary: int) -> list[list[int]]:
    """Of different lengths; the fifth begins as the fourth does."""
    torch.manual_seed(0)
    made = [torch.randint(1, vocabulary, (length,)).tolist() for length in LENGTHS]
    made[4] = made[3][:12] + made[4]
    return made


@functools.cache
def expected(name: str) -> list[list[int]]:
    """What transformers generates greedily, one prompt after another."""
    model = module(name)
    return [greedy(model, prompt, NEW) for prompt in prompts(vocabulary(name))]


def vocabulary(name: str) -> int:
    return int(module(name).get_input_embeddings().num_embeddings)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in made[0, len(prompt) :]]


def source(name: str, kind: str, folder: Path) -> Any:
    if kind == "module":
        return module(name)
    if kind == "file":
        return DEMO / "model.onnx" if name == "demo" else zoo.exported(name, "dynamo")
    module(name).save_pretrained(folder)
    return folder


@functools.cache
def llama(**more: Any) -> LLM:
    return LLM(module("llama"), **SMALL, **more)


@pytest.mark.parametrize("kind", ["module", "folder", "file"])
@pytest.mark.parametrize("name", ["demo", "llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_greedy_tokens_are_those_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    """Chunks of prompts beside steps, a prefix that is shared, and a pool so small that sequences are computed again."""
    llm = LLM(source(name, kind, tmp_path), max_tokens_in_flight=72 if name == "gemma2" else 48, **SMALL)
    found = llm.generate(prompts(vocabulary(name)), SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [result.token_ids for result in found] == expected(name)
    assert llm.padded is None
    assert llm.engine.scheduler.preemptions > 0
    assert llm.engine.scheduler.reused > 0
    assert max(llm.statistics.tokens) <= 16
    llm.engine.pool.check([])
    assert llm.is_idle


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_pages_that_are_let_go_are_not_read(name: str) -> None:
    """They hold NaN from then on, and so do those that are taken until they are written."""
    llm = LLM(module(name), max_tokens_in_flight=72 if name == "gemma2" else 48, **SMALL)
    spoiled(llm)
    given = prompts(vocabulary(name))
    for _ in range(2):  # the second time prefixes are known
        found = llm.generate(given, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        assert [result.token_ids for result in found] == expected(name)
    two = llm.generate([given[3]], SamplingParams(max_new_tokens=NEW, n=2, ignore_eos=True))
    assert [result.token_ids for result in two] == [expected(name)[3]] * 2
    assert llm.engine.scheduler.preemptions > 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_pages_of_int8(name: str) -> None:
    """In chunks, with shared prefixes, samples that part, and sequences that are computed again: as alone, and nearly as in floats."""
    given = prompts(vocabulary(name))
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    llm = LLM(module(name), kv_cache="int8", max_tokens_in_flight=48, **SMALL)
    spoiled(llm)
    found = [result.token_ids for result in llm.generate(given, params)]
    assert llm.engine.scheduler.preemptions > 0 and llm.engine.scheduler.reused > 0
    again = [result.token_ids for result in llm.generate(given, params)]  # prefixes are known
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in given]
    assert found == again == alone
    same = sum(a == b for x, y in zip(found, expected(name), strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 0.8 * NEW * len(given)
    two = llm.generate([given[3]], SamplingParams(max_new_tokens=NEW, n=2, ignore_eos=True))
    assert [result.token_ids for result in two] == [found[3]] * 2
    llm.engine.pool.check([])
    floats = LLM(module(name), max_tokens_in_flight=48, **SMALL)
    pages = [one.runner.stepper.page_bytes(one.engine.pool.groups) for one in (llm, floats)]  # type: ignore[attr-defined]
    assert pages[0] == pages[1] * (16 + 2) / (4 * 16)  # heads of 16 channels, one scale each


def test_kinds_of_caches() -> None:
    assert [LLM(module("llama"), kv_cache=kind, **SMALL).kv_group for kind in ("auto", "fp32", "int8:32")] == [0, 0, 32]
    for kind in ("int8:", "int8:0", "int8:48", "int8:64x", "int4", "bf16"):
        with pytest.raises(UsageError, match=f"kv_cache must be auto, fp32, int8, int8:32, .*, got '{kind}'"):
            LLM(module("llama"), kv_cache=kind, **SMALL)
    with pytest.raises(UsageError, match="kv_cache int8 needs steps over pages; this model runs by its graph, .* Cast"):
        LLM(module("bloom"), kv_cache="int8", **SMALL)


@pytest.mark.parametrize(
    ("name", "node"), [("bloom", "Cast"), ("falcon", "Gather"), ("mixtral", "Reshape"), ("gptj", "GatherElements")]
)
def test_what_is_not_token_wise_runs_padded(name: str, node: str) -> None:
    llm = LLM(module(name), max_tokens_in_flight=60, **SMALL)
    found = llm.generate(prompts(vocabulary(name)), SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [result.token_ids for result in found] == expected(name)
    assert llm.padded is not None and node in llm.padded
    assert llm.engine.scheduler.preemptions > 0


def test_logits_do_not_depend_on_who_is_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, where steps are filled up to one bucket."""
    monkeypatch.setattr(running, "BUCKETS", (64,))
    given = prompts(vocabulary("llama"))

    def logits(asked: list[list[int]]) -> dict[tuple[str, int], Tensor]:
        whole = SMALL | {"max_step_tokens": 256}  # no prompt in chunks
        llm = LLM(module("llama"), prefix_caching=False, **whole)
        found, run = {}, llm.runner.run

        def noted(step: Any) -> Any:
            made = run(step)
            rows = {sequence.row: sequence for sequence in llm.engine.scheduler.running}
            for row, values in zip(step.rows.tolist(), made[0], strict=True):
                if row >= 0:
                    found[rows[row].request_id, rows[row].generated] = values.clone()
            return made

        llm.runner.run = noted  # type: ignore[method-assign]
        llm.generate(asked, SamplingParams(max_new_tokens=4, ignore_eos=True))
        return found

    together = logits(given)
    assert len(together) == 4 * len(given)
    for i, prompt in enumerate(given):
        for (_, count), values in logits([prompt]).items():
            assert torch.equal(values, together[f"request-{i}", count])


def test_samples_share_their_prompt_and_repeat() -> None:
    llm = llama()
    prompt = prompts(vocabulary("llama"))[3]
    params = SamplingParams(max_new_tokens=8, temperature=1.3, seed=5, n=4, ignore_eos=True)
    four = llm.generate([prompt], params)
    assert [result.index for result in four] == [0, 1, 2, 3]
    assert len({tuple(result.token_ids) for result in four}) > 1
    each = [SamplingParams(max_new_tokens=8, temperature=1.3, seed=5 + i, ignore_eos=True) for i in range(4)]
    alone = llm.generate([prompt] * 4, each)
    assert [r.token_ids for r in four] == [r.token_ids for r in alone]
    llm.engine.pool.check([])


def test_without_prefix_caching_the_same() -> None:
    given = [prompts(vocabulary("llama"))[3]] * 2
    llm = LLM(module("llama"), prefix_caching=False, **SMALL)
    found = llm.generate(given, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [result.token_ids for result in found] == [expected("llama")[3]] * 2
    assert not llm.engine.scheduler.reused


def test_scores_and_log_probabilities_are_the_models() -> None:
    llm, model = llama(), module("llama")
    texts = prompts(vocabulary("llama"))
    for text, scored in zip(texts, llm.score(texts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0].log_softmax(-1)
        wanted = [float(logits[i, token]) for i, token in enumerate(text[1:])]
        assert scored.token_ids == text
        assert np.allclose(scored.logprobs, wanted, atol=1e-4)
    result = llm.generate([texts[5]], SamplingParams(max_new_tokens=3, logprobs=4, ignore_eos=True))[0]
    assert result.logprobs is not None and result.top_logprobs is not None
    whole = texts[5] + result.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    for i, (token, logprob, likeliest) in enumerate(
        zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True)
    ):
        row = logits[len(texts[5]) - 1 + i]
        assert abs(float(row[token]) - logprob) < 1e-4
        assert list(likeliest) == row.topk(4).indices.tolist()
        assert likeliest[token] == logprob


def test_a_token_of_the_end_ends() -> None:
    prompt, tokens = prompts(vocabulary("llama"))[0], expected("llama")[0]
    llm = llama()
    stop = tokens[4]
    result = llm.generate([prompt], SamplingParams(max_new_tokens=NEW, stop=stop, ignore_eos=True))[0]
    assert result.token_ids == tokens[: tokens.index(stop) + 1]
    assert result.finish_reason == "stop"
    least = tokens.index(stop) + 2
    longer = llm.generate(
        [prompt], SamplingParams(max_new_tokens=NEW, min_new_tokens=least, stop=stop, ignore_eos=True)
    )[0]
    assert len(longer.token_ids) >= least
    assert stop not in longer.token_ids[:least]


def test_the_demo_writes_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    llm = LLM(DEMO / "model.onnx", device="cpu")
    prompt = "Once upon a time"
    ids = tokenizer.encode(prompt)
    whole = llm.generate(prompt, SamplingParams(max_new_tokens=24))[0]
    assert whole.prompt_token_ids == ids
    ending = [token for token in whole.token_ids if token not in llm.engine.eos]
    assert whole.text == tokenizer.decode(ids + ending)[len(tokenizer.decode(ids)) :]
    chunks = list(llm.stream(prompt, SamplingParams(max_new_tokens=24)))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    stop = whole.text[5:9]
    cut = list(llm.stream(prompt, SamplingParams(max_new_tokens=24, stop=stop)))
    assert "".join(chunk.text for chunk in cut) == whole.text[: whole.text.index(stop)]
    assert cut[-1].finish_reason == "stop"


def test_streams_beside_one_another() -> None:
    llm = llama()
    given = prompts(vocabulary("llama"))
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)

    async def one(prompt: list[int]) -> list[int]:
        return [token async for chunk in llm.stream([prompt], params) for token in chunk.token_ids]

    async def every() -> list[list[int]]:
        return await asyncio.gather(*(one(prompt) for prompt in given))

    assert asyncio.run(every()) == expected("llama")
    longer = SamplingParams(max_new_tokens=40, ignore_eos=True)
    first, second = llm.stream([given[0]], longer), llm.stream([given[1]], params)
    next(first)
    assert [t for chunk in second for t in chunk.token_ids] == expected("llama")[1]
    first.close()
    assert first.results[0].finish_reason == "cancelled"
    while not llm.is_idle:
        llm.step()
    llm.engine.pool.check([])


def test_requests_one_by_one() -> None:
    llm = llama()
    given = prompts(vocabulary("llama"))
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    for i, prompt in enumerate(given):
        assert llm.add_request(prompt, params, request_id=str(i)) == str(i)
    llm.cancel("7")  # it waits
    done = {chunk.request_id: chunk.result for _ in range(3) for chunk in llm.step() if chunk.finish_reason is not None}
    llm.cancel("0")  # it runs
    llm.cancel("6")  # its prompt is half computed, or it waits
    llm.cancel("6")
    while not llm.is_idle:
        for chunk in llm.step():
            assert chunk.request_id not in done
            if chunk.finish_reason is not None:
                done[chunk.request_id] = chunk.result
    assert {i: done[str(i)].token_ids for i in range(1, 6)} == {i: expected("llama")[i] for i in range(1, 6)}
    assert {i for i in done if done[i].finish_reason == "cancelled"} == {"0", "6", "7"}
    llm.engine.pool.check([])


def test_bad_requests_are_refused_and_the_others_go_on() -> None:
    llm = LLM(module("llama"), max_tokens_in_flight=32, **SMALL)
    given = prompts(vocabulary("llama"))
    bad: list[tuple[Any, str]] = [
        ([], "the prompt is empty"),
        ([3, vocabulary("llama")], f"token id {vocabulary('llama')} of the prompt is none of 0 to"),
        ([-1], "token id -1"),
        ([1] * 60, "the prompt has 60 tokens; the cache and the model take 32"),
        ("text", "a prompt of text needs a tokenizer"),
        ([1.5], "whole numbers"),
    ]
    asked = [given[0], *(prompt for prompt, _ in bad), given[1]]
    found = llm.generate(asked, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [found[0].token_ids, found[-1].token_ids] == expected("llama")[:2]
    for result, (_, reason) in zip(found[1:-1], bad, strict=True):
        assert result.finish_reason == "refused"
        assert result.error is not None and reason in result.error
    with pytest.raises(UsageError, match="the prompt is empty"):
        llm.generate([[]])
    llm.add_request(given[0], request_id="a")
    with pytest.raises(UsageError, match="there is a request 'a' already"):
        llm.add_request(given[0], request_id="a")
    llm.cancel("a")
    with pytest.raises(UsageError, match="n is 9; at most 8"):
        llm.add_request(given[0], SamplingParams(n=9))
    with pytest.raises(UsageError, match="stop texts need a tokenizer"):
        llm.add_request(given[0], SamplingParams(stop="x"))
    with pytest.raises(UsageError, match="2 prompts and 1 params"):
        llm.generate(given[:2], [SamplingParams()])


def test_a_sequence_as_long_as_the_cache_ends_there() -> None:
    llm = LLM(module("llama"), max_tokens_in_flight=16, **SMALL)
    prompt = prompts(vocabulary("llama"))[1]
    result = llm.generate([prompt], SamplingParams(max_new_tokens=40, ignore_eos=True))[0]
    assert result.finish_reason == "length"
    assert result.token_ids == greedy(module("llama"), prompt, 40)[: 16 + 1 - len(prompt)]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temperature": float("nan")}, "temperature must be a finite number of at least 0, got nan"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p must be a number above 0"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop must be strings that are not empty"),
        ({"stop": [-1]}, "stop"),
        ({"logprobs": 1000}, "logprobs"),
        ({"n": 0}, "n must be"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
    ],
)
def test_parameters_that_cannot_be(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        SamplingParams(**wrong)


def test_a_generation_config_means_what_transformers_means() -> None:
    llm, model, prompt = llama(), module("llama"), prompts(vocabulary("llama"))[5]
    for config in (
        GenerationConfig(max_new_tokens=8, repetition_penalty=1.4),
        GenerationConfig(max_length=len(prompt) + 6, do_sample=False, num_beams=1),
        GenerationConfig(max_new_tokens=9, min_new_tokens=4, eos_token_id=expected("llama")[5][1]),
    ):
        wanted = model.generate(torch.tensor([prompt]), generation_config=config, pad_token_id=0)[0, len(prompt) :]
        result = llm.generate([prompt], config)[0]
        assert result.token_ids == wanted.tolist()
    with pytest.raises(UsageError, match="num_beams is not supported"):
        llm.generate([prompt], GenerationConfig(num_beams=4))
    sampled = SamplingParams.of(
        GenerationConfig(do_sample=True, top_p=0.8, num_return_sequences=3, max_new_tokens=5), 4
    )
    assert (sampled.temperature, sampled.top_k, sampled.top_p, sampled.n) == (1.0, 50, 0.8, 3)


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="no keys and values are kept"):
        LLM(module("bert"), device="cpu")
    with pytest.raises(UsageError, match="LLM takes a decoder of transformers"):
        LLM(nn.Linear(3, 3))
    for wrong, reason in (
        ({"dtype": "int3"}, "dtype must be bf16"),
        ({"kv_cache": "int3"}, "kv_cache must be auto"),
        ({"page_size": 0}, "page_size must be a whole number"),
        ({"memory_fraction": 0.0}, "memory_fraction"),
        ({"device": "quantum"}, "there is no device"),
    ):
        with pytest.raises(UsageError, match=reason):
            LLM(module("llama"), **wrong)


def test_a_compiled_module_generates() -> None:
    llm = LLM(fuser.compile(module("qwen2")), **SMALL)
    given = prompts(vocabulary("qwen2"))[:2]
    found = llm.generate(given, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [result.token_ids for result in found] == expected("qwen2")[:2]


def test_a_file_alone_has_no_more_positions_than_are_embedded(tmp_path: Path) -> None:
    """Of a file without a config; a length that is asked for is refused."""
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(zoo.exported("gpt2", "dynamo").read_bytes())
    llm = LLM(alone, device="cpu", verify=False)
    assert llm.max_length == architectures.MAX_POSITIONS
    given = prompts(vocabulary("gpt2"))[:2]
    found = llm.generate(given, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [result.token_ids for result in found] == expected("gpt2")[:2]
    with pytest.raises(UsageError, match="max_length is 81, the model has embeddings of 80 positions"):
        LLM(alone, device="cpu", max_length=81, verify=False)


def test_what_is_scored_beside_what_cannot_be() -> None:
    llm = llama()
    with pytest.raises(UsageError, match="the prompt is empty"):
        llm.score([[1, 2, 3], []])
    while not llm.is_idle:
        llm.step()
    llm.engine.pool.check([])
