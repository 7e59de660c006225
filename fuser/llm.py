"""`fuser.LLM(model).generate(prompts)`: text from any decoder that fuser fuses, over a paged cache, many requests at once."""

import asyncio
import os
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn

from fuser.codegen.kv_groups import kv_group_of
from fuser.errors import UnsupportedOperator, UsageError
from fuser.formats import Format
from fuser.padded import PaddedRunner
from fuser.pipeline import Progress
from fuser.quantizing import Choices, choices
from fuser.running import PagedRunner
from fuser.runtime.engine import Engine, Event, Runner, Scores, Statistics
from fuser.runtime.paging import Group, Pool, layer_groups
from fuser.runtime.parameters import SamplingParams
from fuser.runtime.text import Growing, Tokenizer
from fuser.sources import Source, source_of
from fuser.stepping import DTYPES, Stepper, dtype_of

CPU_TOKENS = 16384  # that the cache holds on the CPU, if memory allows
RESERVED = 1 << 29  # bytes on a GPU for what libraries take

Prompt = str | Sequence[int]


@dataclass
class Result:
    """One sample of one prompt.

    Attributes:
        request_id: of the request.
        index: which of its samples.
        prompt_token_ids: what was given.
        token_ids: what was made; a token that ended it is the last.
        text: likewise, without what ended it; empty where there is no tokenizer.
        finish_reason: `stop`: a token or text that ends it; `length`: as long as was asked for, or as can be; `cancelled`;
            `refused`: the request cannot be, `error` says why. None: it goes on.
        logprobs: of each token, where they were asked for.
        top_logprobs: of the likeliest tokens at each, likewise.
    """

    request_id: str
    index: int = 0
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Chunk:
    """What a step added to a sample: new text may lag behind its tokens. `result` is all of it so far."""

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None
    result: Result


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of a text's tokens, each of those before it; of the first there is none."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass
class _Sample:
    result: Result
    growing: Growing | None


@dataclass
class _Request:
    prompt: list[int]
    samples: list[_Sample]
    scores: list[float] = field(default_factory=list)
    inbox: "deque[Chunk] | None" = None  # of whoever waits for this request; else `step` returns what comes

    @property
    def is_done(self) -> bool:
        return all(sample.result.finish_reason is not None for sample in self.samples)


class LLM:
    """A decoder that generates text.

    Attributes:
        report: what was fused and how it was verified.
        padded: why steps are run by the graph on padded batches, naming the node that prevents ragged ones; None: they are
            ragged.
        statistics: what steps did.
        max_length: the most tokens of a sequence, prompt and output.
        kv_group: channels of a head that have a scale between them in a cache of int8; 0: the cache is of `dtype`.
    """

    def __init__(
        self, model: "str | os.PathLike[str] | nn.Module | Source", *, dtype: str | None = None,
        device: torch.device | str | None = None, kv_cache: str = "auto", page_size: int = 16,
        max_tokens_in_flight: int | None = None, memory_fraction: float = 0.9, max_length: int | None = None,
        max_sequences: int = 256, max_step_tokens: int | None = None, prefix_caching: bool = True, tokenizer: Any = None,
        verify: bool = True, progress: Progress | None = None, quantization: "str | Format | Choices | None" = None,
    ) -> None:  # fmt: skip
        """
        Args:
            model: an ONNX file, a Hugging Face folder, a model of transformers, or what `fuser.compile` made of one.
            dtype: bf16, fp16 or fp32, of weights, activations and cache; by default the model's own, on the CPU fp32.
            device: by default the model's if it is on a GPU, else a GPU that is there, else the CPU.
            kv_cache: the element type of keys and values; auto: `dtype`. int8: by groups of 64 channels of a head, or of all
                if there are less, with a scale each; int8:32 and int8:128: by other groups.
            page_size: tokens of a page.
            max_tokens_in_flight: the most tokens that the cache holds; by default what memory allows.
            memory_fraction: of the device's memory, how much weights, cache and work may take together.
            max_length: the longest sequence; by default what the model's config says, else 4096.
            max_sequences: the most that are computed at once.
            max_step_tokens: the most tokens of one step: longer prompts are computed in chunks. By default 2048, 512 on CPU.
            prefix_caching: share pages between sequences that begin alike.
            tokenizer: with `encode` and `decode`, or a folder; by default that of the model's folder, if it has one.
            verify: prove rewrites numerically, and compare small models whole.
            progress: called with the name of each stage as it begins.
            quantization: of weights, as `fuser.quantize` takes it: `int8`, `int4`, `int4:64`, `nf4`, `w8a8`, ...; what
                `fuser.quantizing.choices` makes says more. By default they are as the model has them.

        Raises:
            InputError: the model cannot be read or captured.
            UnsupportedOperator: it cannot be run, or is no decoder.
            UsageError: an argument cannot be.
        """
        note = progress or (lambda stage: None)
        if isinstance(quantization, (str, Format)):
            quantization = choices(quantization)
        source = source_of(model, verify=verify, note=note, choices=quantization, device=_rounding_device(device))
        self.device = _device(device, source)
        self.dtype = dtype or ("fp32" if self.device.type == "cpu" else dtype_of(source.graph))
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
        self.kv_group = kv_group_of(kv_cache, self.dtype)
        for name, value, least in (
            ("page_size", page_size, 1), ("max_sequences", max_sequences, 1), ("max_tokens_in_flight", max_tokens_in_flight, 1),
            ("max_length", max_length, 1), ("max_step_tokens", max_step_tokens, 1),
        ):  # fmt: skip
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UsageError(f"{name} must be a whole number of {least} or more, got {value!r}")
        if not 0 < memory_fraction <= 1:
            raise UsageError(f"memory_fraction must be above 0 and at most 1, got {memory_fraction!r}")
        self.report = source.report
        self.tokenizer: Tokenizer | None = source.tokenizer(tokenizer)
        self.max_length = max_length or source.max_length or 4096
        self._is_length_given = max_length is not None
        step_tokens = max(max_step_tokens or (2048 if self.device.type == "cuda" else 512), max_sequences)
        self.padded: str | None = None
        runner: Runner
        sizing = _Sizing(max_tokens_in_flight, memory_fraction, page_size, self.max_length, self.device)
        try:
            runner, pool = self._paged(source, sizing, step_tokens, max_sequences, prefix_caching, note)
        except UnsupportedOperator as reason:
            if self.kv_group:
                raise UsageError(
                    f"kv_cache {kv_cache} needs steps over pages; this model runs by its graph, on padded batches: {reason}"
                ) from None
            self.padded = str(reason)
            runner, pool = self._padded(source, sizing, prefix_caching)
        self.runner = runner
        self.engine = Engine(
            runner, pool, positions=self.max_length, step_tokens=step_tokens, step_rows=max_sequences,
            sequences=max_sequences, eos=source.eos, sees_same_step=self.padded is None,
        )  # fmt: skip
        self._requests: dict[str, _Request] = {}
        self._lock = threading.RLock()
        self._ids = count()
        self._unclaimed: list[Chunk] = []  # of requests that nobody waits for, until `step` is called

    def _paged(
        self, source: Source, sizing: "_Sizing", step_tokens: int, sequences: int, prefix_caching: bool, note: Progress
    ) -> tuple[Runner, Pool]:
        kernels: Any = "triton" if self.device.type == "cuda" else "reference"
        stepper = Stepper(
            source.graph,
            dtype=self.dtype,
            device=self.device,
            page=sizing.page,
            positions=self.max_length,
            kernels=kernels,
            kv_group=self.kv_group,
        )
        if stepper.most_positions < self.max_length:
            if self._is_length_given:
                raise UsageError(
                    f"max_length is {self.max_length}, the model has embeddings of {stepper.most_positions} positions"
                )
            self.max_length = stepper.weights.positions = stepper.most_positions
        groups = layer_groups([state.window for state in stepper.states])
        if not groups:
            raise UnsupportedOperator("no generation: the model declares no keys and values that it keeps")
        note("load weights")
        stepper.load()
        whole = stepper.program(step_tokens, decode=False, rows=sequences)
        pages = sizing.pages(stepper.page_bytes(groups), len(groups), whole.row_bytes)
        stepper.allocate(pages + 1, groups)
        note("load kernels")
        runner = PagedRunner(
            stepper,
            step_tokens=step_tokens,
            step_rows=sequences,
            sequences=sequences,
            positions=self.max_length,
            note=note,
        )
        return runner, Pool(pages, sizing.page, groups, prefix_caching=prefix_caching)

    def _padded(self, source: Source, sizing: "_Sizing", prefix_caching: bool) -> tuple[Runner, Pool]:
        runner = PaddedRunner(source.graph, device=self.device, page=sizing.page)
        pages = sizing.pages(runner.page_bytes, 1, 0)
        runner.allocate(pages + 1)
        return runner, Pool(
            pages, sizing.page, [Group(None, tuple(range(len(runner.states))))], prefix_caching=prefix_caching
        )

    @property
    def statistics(self) -> Statistics:
        return self.engine.statistics

    # One request after another, driven by the caller

    def add_request(self, prompt: Prompt, params: Any = None, *, request_id: str | None = None) -> str:
        """Queues a prompt, text or token ids; gives the request's id.

        Raises:
            UsageError: the prompt is empty, longer than the cache or the model takes, or holds no tokens of the model; the
                parameters cannot be; there is such a request already.
        """
        with self._lock:
            return self._added(prompt, params, request_id, inbox=None)

    def step(self) -> list[Chunk]:
        """Computes one step, and gives what it, or the one before it, added to requests that nobody else waits for."""
        with self._lock:
            if not self._unclaimed:
                self._pump()
            found, self._unclaimed = self._unclaimed, []
            return found

    def _pump(self) -> None:
        """One step; what it made goes to those who wait for it."""
        chunks = self._advanced()
        for chunk in chunks:
            inbox = self._requests[chunk.request_id].inbox
            (self._unclaimed if inbox is None else inbox).append(chunk)
        for request_id in {chunk.request_id for chunk in chunks}:
            if self._requests[request_id].is_done:
                del self._requests[request_id]

    def cancel(self, request_id: str) -> None:
        """Ends a request, waiting, running or half computed; its samples' reason is `cancelled`. Unknown ones are none."""
        with self._lock:
            request = self._requests.pop(request_id, None)
            if request is None:
                return
            for sample in request.samples:
                if sample.result.finish_reason is None:
                    sample.result.finish_reason = "cancelled"
                    inbox = self._unclaimed if request.inbox is None else request.inbox
                    inbox.append(_chunk(sample.result, [], ""))
            for sequence in [s for s in self.engine.scheduler.sequences if s.request_id == request_id]:
                self.engine.finish(sequence, "cancelled")

    @property
    def is_idle(self) -> bool:
        """Whether no request is left, and nothing to be told of one."""
        return not self._requests and not self._unclaimed and self.engine.is_idle

    # All at once

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Any = None) -> list[Result]:
        """Generates for all prompts together.

        Args:
            prompts: a text, token ids, or a sequence of these.
            params: SamplingParams or a GenerationConfig of transformers, for all, or a sequence of one for each.

        Returns:
            A result for each sample: in the order of the prompts, `n` one after another. A request that cannot be has one that
            is `refused` and says why.

        Raises:
            UsageError: none of the requests can be, or there is not one `params` for each.
        """
        stream = self.stream(prompts, params)
        for _ in stream:
            pass
        if stream.refused and len(stream.refused) == len(stream.results):
            raise UsageError(str(stream.refused[0]))
        return stream.results

    def stream(self, prompts: Prompt | Sequence[Prompt], params: Any = None) -> "Stream":
        """The same, to iterate over as it is made, with `for` or `async for`; what is left when it is closed is cancelled."""
        given = _prompts(prompts)
        each = list(params) if isinstance(params, (list, tuple)) else [params] * len(given)
        if len(each) != len(given):
            raise UsageError(f"there are {len(given)} prompts and {len(each)} params")
        return Stream(self, given, each)

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[Scored]:
        """Log-probabilities of every token of texts, of those before it.

        Raises:
            UsageError: a text cannot be a prompt.
        """
        with self._lock:
            plain = SamplingParams(max_new_tokens=1)
            ids: list[str] = []
            try:
                ids.extend(self._added(text, plain, None, inbox=deque(), scored=True) for text in _prompts(texts))
            except UsageError:
                for request_id in ids:  # those before it
                    self.cancel(request_id)
                raise
            requests = [self._requests[request_id] for request_id in ids]
            while not all(request.is_done for request in requests):
                self._pump()
        return [Scored(request.prompt, request.scores) for request in requests]

    # Between requests and the engine

    def _added(
        self, prompt: Prompt, params: Any, request_id: str | None, *, inbox: deque[Chunk] | None, scored: bool = False
    ) -> str:
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        if request_id in self._requests:
            raise UsageError(f"there is a request '{request_id}' already")
        tokens = self._encoded(prompt)
        chosen = _parameters(params, len(tokens))
        if chosen.stop_strings and self.tokenizer is None:
            raise UsageError("stop texts need a tokenizer; give LLM one, or stop at token ids")
        seed = secrets.randbits(48) if chosen.seed is None else chosen.seed
        self.engine.add(request_id, tokens, chosen, seed=seed, scored=scored)
        samples = []
        for index in range(chosen.n):
            result = Result(request_id, index, tokens)
            if chosen.logprobs is not None:
                result.logprobs, result.top_logprobs = [], []
            growing = Growing(self.tokenizer, tokens, chosen.stop_strings) if self.tokenizer is not None else None
            samples.append(_Sample(result, growing))
        self._requests[request_id] = _Request(tokens, samples, inbox=inbox)
        return request_id

    def _encoded(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt) if isinstance(prompt, Iterable) else prompt
        if self.tokenizer is None:
            raise UsageError(
                "a prompt of text needs a tokenizer, and the model has none: give token ids, or LLM a tokenizer"
            )
        return list(self.tokenizer.encode(prompt))

    def _advanced(self) -> list[Chunk]:
        """One step of the engine, told as chunks."""
        found = []
        for event in self.engine.step():
            request = self._requests.get(event.sequence.request_id)
            if request is None:
                continue
            if isinstance(event, Scores):
                request.scores[event.start :] = event.logprobs  # a preempted one begins again
                if event.sequence.finish_reason is not None:
                    request.samples[0].result.finish_reason = "length"
                    found.append(_chunk(request.samples[0].result, [], ""))
            else:
                found.append(self._told(request.samples[event.sequence.index], event))
        return found

    def _told(self, sample: _Sample, event: Event) -> Chunk:
        result, sequence = sample.result, event.sequence
        result.token_ids.append(event.token)
        if result.logprobs is not None and result.top_logprobs is not None and event.logprob is not None:
            result.logprobs.append(event.logprob)
            result.top_logprobs.append(event.top or {})
        text = ""
        if sample.growing is not None:
            ends = sequence.finish_reason == "stop"  # by a token, which is no text
            if not ends:
                sample.growing.add(event.token)
                if sample.growing.is_stopped:
                    self.engine.finish(sequence, "stop")
                    sequence.finish_reason = "stop"
            text = sample.growing.taken(is_last=sequence.finish_reason is not None)
            result.text += text
        result.finish_reason = sequence.finish_reason
        return _chunk(result, [event.token], text)


class Stream:
    """Chunks of requests as they are made, for `for` and `async for`; `results` fill as it goes."""

    def __init__(self, llm: LLM, prompts: Sequence[Prompt], params: Sequence[Any]) -> None:
        self.llm, self.inbox = llm, deque[Chunk]()
        self.results: list[Result] = []
        self.refused: list[UsageError] = []
        self._ids: list[str] = []
        with llm._lock:
            for prompt, chosen in zip(prompts, params, strict=True):
                try:
                    request_id = llm._added(prompt, chosen, None, inbox=self.inbox)
                except UsageError as error:
                    self.refused.append(error)
                    refused = Result(f"request-{next(llm._ids)}", finish_reason="refused", error=str(error))
                    self.results.append(refused)
                    self.inbox.append(_chunk(refused, [], ""))
                else:
                    self._ids.append(request_id)
                    self.results += [sample.result for sample in llm._requests[request_id].samples]

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Chunk:
        if not self._filled():
            raise StopIteration
        return self.inbox.popleft()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Chunk:
        if not self.inbox and not await asyncio.to_thread(self._filled):
            raise StopAsyncIteration
        return self.inbox.popleft()

    def _filled(self) -> bool:
        """Computes until there is a chunk; False: there will be none."""
        while not self.inbox:
            with self.llm._lock:
                if self.inbox:
                    break
                if all(result.finish_reason is not None for result in self.results):
                    return False
                self.llm._pump()
        return True

    def close(self) -> None:
        """Cancels what is not done."""
        for request_id in self._ids:
            self.llm.cancel(request_id)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class _Sizing:
    """How many pages there are to be."""

    tokens: int | None
    fraction: float
    page: int
    positions: int
    device: torch.device

    def pages(self, page_bytes: int, groups: int, work_bytes: int) -> int:
        """Pages of `page_bytes` each, of which a token takes one of every group.

        Raises:
            UsageError: memory holds not even one for each group.
        """
        wanted = None if self.tokens is None else -(-self.tokens // self.page) * groups
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            room = free - (1 - self.fraction) * total - work_bytes - RESERVED
        else:
            room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * self.fraction - work_bytes
            wanted = wanted or -(-max(CPU_TOKENS, self.positions) // self.page) * groups
        most = int(room // page_bytes) - 1
        if most < groups:
            raise UsageError(f"memory holds no page of the cache: {max(room, 0) / 1e9:.2f} GB are left for it")
        return min(wanted or most, most)


def _device(device: torch.device | str | None, source: Source) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError:
            raise UsageError(f"there is no device {device!r}") from None
    if source.device is not None and source.device.type == "cuda":
        return source.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rounding_device(device: torch.device | str | None) -> torch.device | None:
    """Where weights are quantized: on the GPU, if there is one to be used."""
    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else None
    return torch.device(device) if str(device).startswith("cuda") else None


def _prompts(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    given = list(prompts)
    return [given] if given and all(isinstance(item, int) for item in given) else given


def _parameters(params: Any, prompt: int) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if isinstance(params, SamplingParams):
        return params
    if hasattr(params, "to_dict") and hasattr(params, "max_new_tokens"):
        return SamplingParams.of(params, prompt)
    raise UsageError(f"params must be SamplingParams or a GenerationConfig, got {type(params).__name__}")


def _chunk(result: Result, tokens: list[int], text: str) -> Chunk:
    return Chunk(result.request_id, result.index, tokens, text, result.finish_reason, result)
