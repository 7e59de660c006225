"""One step after another: what the scheduler chose becomes tensors, a runner computes logits, tokens are chosen and read.

On a device of its own pace the next step is launched before the tokens of the last one are read: they stay on the device, where
the next step finds them.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fuser.errors import UsageError
from fuser.runtime.paging import Pool
from fuser.runtime.parameters import SamplingParams
from fuser.runtime.sampling import Choice, sample, uniform
from fuser.runtime.scheduler import Batch, Part, Scheduler, Sequence

Ints = NDArray[np.int32]


@dataclass
class Step:
    """What a runner takes: the new tokens of any sequences, one after another, all int32.

    tokens, sources, positions [n] (where a source is not -1, the token is what was chosen last for that row),
    slot_mapping [groups, n], block_table [groups, sequences, blocks], context_lens [sequences], query_starts [sequences + 1],
    logit_rows [m], and rows [m] for which a token is chosen of them (-1: none is). `decode`: every sequence has one token.
    """

    decode: bool
    tokens: Ints
    sources: Ints
    positions: Ints
    slot_mapping: Ints
    block_table: Ints
    context_lens: Ints
    query_starts: Ints
    longest: int
    logit_rows: Ints
    rows: Ints


class Runner(Protocol):
    """Computes steps over pages, on a device."""

    device: torch.device
    vocabulary: int
    looks_ahead: bool  # whether launching a step does not wait for it

    def run(self, step: Step) -> tuple[Tensor, Tensor]:
        """Logits [m, V], and the token of the highest one of each row [m] int32, which is chosen unless another is told."""
        ...

    def choose(self, tokens: Tensor) -> None:
        """The tokens that are chosen of the first rows of the step before, in place of the highest ones."""
        ...

    def copy(self, sources: Items[int], targets: Items[int]) -> None:
        """Copies whole pages, all sources read before any target is written."""
        ...


@dataclass(frozen=True)
class Event:
    """A token of a sequence, with the logarithm of its probability and the likeliest ones' if they were asked for."""

    sequence: Sequence
    token: int
    logprob: float | None = None
    top: dict[int, float] | None = None


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the tokens of a scored sequence that follow the first of them, a part of it."""

    sequence: Sequence
    start: int
    logprobs: list[float]


@dataclass
class Statistics:
    """What the engine did. Batch sizes, tokens and pages are by step; times are when each was read, in seconds."""

    steps: int = 0
    chosen: int = 0  # tokens
    batch: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    finished_s: list[float] = field(default_factory=list)


@dataclass
class _Flight:
    """A step that was launched: what it chooses, on its way to the host."""

    batch: Batch
    chosen: list[Sequence]
    choice: Choice | None
    scores: list[tuple[Part, Tensor]]
    arrived: Any = None  # an event of the device


class Engine:
    """The scheduler, a runner and what is between them. Not for several threads at once."""

    def __init__(
        self, runner: Runner, pool: Pool, *, positions: int, step_tokens: int = 2048, step_rows: int = 256,
        sequences: int = 256, eos: Items[int] = (), sees_same_step: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            positions: the longest sequence that the runner takes.
            step_tokens: the most tokens of a step.
            step_rows: the most tokens of a step whose logits are computed.
            sequences: the most that run at once.
            eos: the tokens that end a sequence.
            sees_same_step: whether the runner writes keys and values to pages before it reads them.
        """
        step_rows, step_tokens = max(step_rows, sequences), max(step_tokens, sequences)
        self.runner, self.pool = runner, pool
        self.scheduler = Scheduler(
            pool, step_tokens=step_tokens, step_rows=step_rows, sequences=sequences, sees_same_step=sees_same_step
        )
        self.sequences = sequences
        self.limit = pool.longest(positions, step_tokens)
        self.eos = frozenset(eos)
        self.statistics = Statistics()
        width = -(-positions // pool.page)
        self._tables = np.zeros((len(pool.groups), sequences, width), np.int32)
        self._flight: _Flight | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute or to read."""
        return self._flight is None and not self.scheduler.running and not self.scheduler.waiting

    def add(
        self, request_id: str, prompt: Items[int], params: SamplingParams, *, seed: int, scored: bool = False
    ) -> Sequence:
        """Queues a request.

        Raises:
            UsageError: the prompt is empty, holds what is no token, or is longer than the pool or the model takes; more
                samples than can run at once.
        """
        tokens = _tokens(prompt, self.runner.vocabulary)
        if len(tokens) > self.limit:
            raise UsageError(f"the prompt has {len(tokens)} tokens; the cache and the model take {self.limit}")
        if params.n > self.sequences:
            raise UsageError(f"n is {params.n}; at most {self.sequences} sequences run at once")
        last = len(tokens) if scored else min(len(tokens) + params.max_new_tokens, self.limit + 1)
        made = Sequence(request_id, 0, tokens, len(tokens), params, seed, last, scored, siblings=params.n - 1)
        self.scheduler.add(made)
        return made

    def step(self) -> list[Event | Scores]:
        """Launches the next step and reads the one before it (without lookahead: this one).

        Of an event's sequence, `finish_reason` says whether it has come to its last token; whoever sees another reason to end
        it calls `finish`.
        """
        if any(_has_history(s.params) for s in self.scheduler.running):
            found = self._read()  # what is chosen depends on tokens that have to be known
        else:
            found = []
        batch = self.scheduler.schedule()
        flight = self._launch(batch) if batch.parts else None
        found += self._read()
        self._flight = flight
        if not self.runner.looks_ahead:
            found += self._read()
        return found

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence in whatever state it is."""
        self.scheduler.finish(sequence, reason)

    def _launch(self, batch: Batch) -> _Flight:
        if batch.copies:
            self.runner.copy([copy.source for copy in batch.copies], [copy.target for copy in batch.copies])
        step, chosen, scored = self._step(batch)
        logits, highest = self.runner.run(step)
        count = len(chosen)
        choice = self._chosen(logits[:count], highest[:count], chosen) if count else None
        scores = []
        start = count
        for part in scored:
            scores.append((part, _followed(logits[start : start + part.count], part)))
            start += part.count
        flight = _Flight(batch, chosen, choice, scores)
        if self.runner.looks_ahead:
            flight.choice = _to_host(choice)
            flight.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            flight.arrived.record()
        self.statistics.steps += 1
        self.statistics.chosen += count
        self.statistics.batch.append(len(batch.parts))
        self.statistics.tokens.append(batch.tokens)
        self.statistics.pages.append(self.pool.used)
        return flight

    def _chosen(self, logits: Tensor, highest: Tensor, chosen: list[Sequence]) -> Choice:
        params = [sequence.params for sequence in chosen]
        if all(_is_greedy(sequence) for sequence in chosen):
            return Choice(highest, None, None)
        steps = [sequence.generated for sequence in chosen]
        u = torch.from_numpy(uniform([sequence.seed for sequence in chosen], steps)).to(logits.device)
        prompts = [sequence.tokens[: sequence.prompt] for sequence in chosen]
        outputs = [sequence.tokens[sequence.prompt :] for sequence in chosen]
        banned = [self.ends(s.params) if s.generated <= s.params.min_new_tokens else () for s in chosen]
        choice = sample(logits, params, u, prompts=prompts, outputs=outputs, banned=banned)
        self.runner.choose(choice.tokens)
        return choice

    def ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        return tuple({*params.stop_tokens, *(() if params.ignore_eos else self.eos)})

    def _step(self, batch: Batch) -> tuple[Step, list[Sequence], list[Part]]:
        """The tensors of a batch, who has tokens chosen by row of logits, and after them whose tokens are scored."""
        tables, page = self._tables, self.pool.page
        tokens: list[int] = []
        sources: list[int] = []
        rows: list[int] = []
        for part in batch.parts:
            sequence, start, stop = part.sequence, part.start, part.start + part.count
            known = sequence.tokens[start:stop]
            tokens += known + [0] * (part.count - len(known))
            sources += [-1] * len(known) + [sequence.row] * (part.count - len(known))
            rows.append(sequence.row)
            assert sequence.pages is not None
            first = min(sequence.written, start // page)
            for g, held in enumerate(sequence.pages.held):
                tables[g, sequence.row, first : len(held)] = held[first:]
            sequence.written = len(sequence.pages.held[0])
        starts = np.array([part.start for part in batch.parts], np.int32)
        counts = np.array([part.count for part in batch.parts], np.int32)
        query_starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        total = int(query_starts[-1])
        positions = np.arange(total, dtype=np.int32) + np.repeat(starts - query_starts[:-1], counts)
        of = np.repeat(np.array(rows, np.int32), counts)
        context = starts + counts
        blocks = -(-int(context.max()) // page)
        slots = tables[:, of, positions // page] * page + positions % page
        chosen: list[Sequence] = []
        scored: list[Part] = []
        logit_rows: list[int] = []
        for part, stop in zip(batch.parts, query_starts[1:].tolist(), strict=True):
            chosen += part.chosen
            logit_rows += [stop - 1] * len(part.chosen)
        for part, stop in zip(batch.parts, query_starts[1:].tolist(), strict=True):
            if part.sequence.scored:
                scored.append(part)
                logit_rows += range(stop - part.count, stop)
        chosen_rows = [sequence.row for sequence in chosen]
        chosen_rows += [-1] * (max(len(logit_rows), 1) - len(chosen_rows))
        decode = total == len(batch.parts) == len(logit_rows) and not scored
        return (
            Step(
                decode, np.array(tokens, np.int32), np.array(sources, np.int32), positions.astype(np.int32),
                slots.astype(np.int32), np.ascontiguousarray(tables[:, rows, :blocks]), context.astype(np.int32), query_starts,
                int(counts.max()), np.array(logit_rows or [0], np.int32), np.array(chosen_rows, np.int32),
            ),
            chosen,
            scored,
        )  # fmt: skip

    def _read(self) -> list[Event | Scores]:
        """What the launched step chose; sequences that have ended since are passed over."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        if flight.arrived is not None:
            flight.arrived.synchronize()
        self.statistics.finished_s.append(perf_counter())
        found: list[Event | Scores] = []
        for part, scored in flight.scores:
            if part.sequence.finish_reason is not None:
                continue
            found.append(Scores(part.sequence, part.start, scored.tolist()))
            if part.start + part.count == part.sequence.last:
                self.finish(part.sequence, "length")
        if flight.choice is None:
            return found
        tokens = flight.choice.tokens.tolist()
        logprobs = flight.choice.logprobs.tolist() if flight.choice.logprobs is not None else []
        tops = [x.tolist() for x in flight.choice.top] if flight.choice.top is not None else []
        for i, (sequence, token) in enumerate(zip(flight.chosen, tokens, strict=True)):
            if sequence.finish_reason is not None:
                continue
            sequence.pending -= 1
            sequence.tokens.append(token)
            if not self.scheduler.sees_same_step:
                self.scheduler.publish(sequence)
            if token in self.ends(sequence.params):
                self.finish(sequence, "stop")
            elif len(sequence.tokens) >= sequence.last:
                self.finish(sequence, "length")
            k = sequence.params.logprobs
            top = {int(t): p for p, t in zip(tops[0][i][:k], tops[1][i][:k], strict=True)} if k and tops else None
            found.append(Event(sequence, token, logprobs[i] if k is not None else None, top))
        return found


def _is_greedy(sequence: Sequence) -> bool:
    """Whether the highest logit is all that is asked for."""
    params = sequence.params
    is_banned = sequence.generated <= params.min_new_tokens
    return not (params.temperature or params.logprobs is not None or is_banned or _has_history(params))


def _has_history(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _tokens(prompt: Items[int], vocabulary: int) -> list[int]:
    """A prompt's token ids.

    Raises:
        UsageError: they are none.
    """
    try:
        tokens = [int(token) for token in prompt if not isinstance(token, (bool, float, str))]
    except (TypeError, ValueError):
        raise UsageError(f"a prompt is text or a sequence of token ids, not {type(prompt).__name__}") from None
    if len(tokens) != len(prompt):
        raise UsageError("a prompt is text or a sequence of token ids, whole numbers")
    if not tokens:
        raise UsageError("the prompt is empty")
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise UsageError(f"token id {wrong} of the prompt is none of 0 to {vocabulary - 1}")
    return tokens


def _followed(logits: Tensor, part: Part) -> Tensor:
    """Log-probabilities of the tokens after each of a part's; of the last of a sequence there is none."""
    known = part.sequence.tokens[part.start + 1 : part.start + part.count + 1]
    target = torch.tensor(known, device=logits.device)[:, None]
    return logits[: len(known)].float().log_softmax(-1).gather(1, target)[:, 0]


def _to_host(choice: Choice | None) -> Choice | None:
    """The same in pinned memory, once the device has come so far."""
    if choice is None:
        return None

    def copied(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    top = (copied(choice.top[0]), copied(choice.top[1])) if choice.top is not None else None
    return Choice(copied(choice.tokens), copied(choice.logprobs) if choice.logprobs is not None else None, top)
