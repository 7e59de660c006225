"""The scheduler: random requests on a small pool, driven as the engine does, with pages that show who reads what."""

import random
from collections import Counter, deque
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fuser.runtime import paging
from fuser.runtime.paging import Group
from fuser.runtime.parameters import SamplingParams
from fuser.runtime.scheduler import Batch, Scheduler, Sequence
from tests.memory import Memory, TracedPool, histories

EOS, VOCABULARY = 0, 3
LIVES, STEPS = 1000, 200  # of the seeded walk
PATIENCE = 150  # steps within which the oldest request comes further
WINDOWS = ((None,), (3,), (None, 2), (5, None), (1, 4))
GREEDY = SamplingParams()
KINDS = (
    "stop", "length", "preempted", "copied", "shared", "forked", "cancelled waiting", "cancelled half computed",
    "cancelled generating", "cancelled unread", "cancelled preempted", "cancelled preempted, unread",
)  # fmt: skip


@dataclass
class Flight:
    """A step that was launched: what it chose, and how many tokens of whom it scored."""

    chosen: list[tuple[Sequence, int]]
    scored: list[tuple[Sequence, int, int]]


def chosen_after(history: int, seed: int) -> int:
    """The model: what follows a token and all before it. The end is rarer than the others."""
    drawn = abs(hash((history, seed))) // 7 % (4 * VOCABULARY)
    return EOS if drawn == 0 else 1 + drawn % (VOCABULARY - 1)


def alone(prompt: list[int], seed: int, last: int) -> list[int]:
    """All tokens of a request that has the model for itself."""
    tokens, values = list(prompt), histories(prompt)
    while len(tokens) < last:
        tokens.append(chosen_after(values[-1], seed))
        values = histories(tokens, values)
        if tokens[-1] == EOS:
            break
    return tokens


class FakeEngine:
    """Does to a scheduler what the engine does, on modelled pages. Arguments choose; any number is valid."""

    def __init__(
        self, windows: tuple[int | None, ...], *, pages: int, page: int, step_tokens: int, step_rows: int, sequences: int,
        positions: int = 40, ahead: int = 1, sees_same_step: bool = True, is_caching: bool = True,
    ) -> None:  # fmt: skip
        groups = [Group(window, (i,)) for i, window in enumerate(windows)]
        self.pool = TracedPool(max(pages, len(groups)), page, groups, prefix_caching=is_caching)
        self.memory = Memory(self.pool)
        self.most, self.ahead = sequences, ahead
        step_tokens, step_rows = max(step_tokens, sequences), max(step_rows, sequences)
        self.scheduler = Scheduler(
            self.pool, step_tokens=step_tokens, step_rows=step_rows, sequences=sequences, sees_same_step=sees_same_step
        )
        self.limit = self.pool.longest(positions, step_tokens)
        self.tables = [[[0] * (positions + 1) for _ in groups] for _ in range(sequences)]  # of the device, by row
        self.tokens = [-1] * sequences  # of the device: what was chosen last for a row
        self.flights: deque[Flight] = deque()
        self.values: dict[tuple[tuple[int, ...], int], tuple[list[int], list[int]]] = {}  # truths, by prompt and seed
        self.seeds: dict[str, int] = {}
        self.scores: dict[Sequence, set[int]] = {}
        self.steps = self.requests = 0
        self.seen: Counter[str] = Counter()
        self.waited, self.mark = 0, (-1, 0, 0)  # steps since the oldest request came further, and how far that was

    @property
    def is_idle(self) -> bool:
        return not self.flights and not self.scheduler.running and not self.scheduler.waiting

    def add(self, prompt: list[int], count: int, n: int, seed: int, scored: bool) -> None:
        """A request of `n` samples of at most `count` tokens each; what the engine refuses is none."""
        self.steps += 1
        prompt = prompt[: self.limit]
        if not prompt:
            return
        last = len(prompt) if scored else min(len(prompt) + count, self.limit + 1)
        siblings = 0 if scored else min(n, self.most) - 1
        self.scheduler.add(
            Sequence(f"{self.requests}", 0, prompt, len(prompt), GREEDY, seed, last, scored, siblings=siblings)
        )
        self.seeds[f"{self.requests}"] = seed
        self.requests += 1

    def cancel(self, which: int, whole: bool) -> None:
        """A sequence, or all of its request, ends in whatever state it is."""
        self.steps += 1
        live = list(self.scheduler.sequences)
        if live:
            chosen = live[which % len(live)]
            for sequence in [s for s in live if s is chosen or (whole and s.request_id == chosen.request_id)]:
                self.seen[f"cancelled {self.state(sequence)}"] += 1
                self.scheduler.finish(sequence, "cancelled")
                self.scheduler.finish(sequence, "twice")
                assert sequence.finish_reason == "cancelled" and not sequence.wanted
        self.check()

    @staticmethod
    def state(sequence: Sequence) -> str:
        if sequence.pages is None:
            return "preempted, unread" if sequence.pending else "preempted" if sequence.generated else "waiting"
        return "unread" if sequence.pending else "generating" if sequence.generated else "half computed"

    def launch(self) -> None:
        """The next step, while at most `ahead` are in flight."""
        self.steps += 1
        while len(self.flights) > self.ahead:
            self.read()
        before = {sequence: sequence.wanted for sequence in self.scheduler.running}
        batch = self.scheduler.schedule()
        self.check_order(batch, before)
        self.seen["preempted"] += batch.preempted
        self.seen["copied"] += len(batch.copies)
        self.seen["shared"] += sum(
            part.start > 0 and not part.sequence.index and not part.sequence.written for part in batch.parts
        )
        self.seen["forked"] += sum(len(part.chosen) > 1 for part in batch.parts)
        self.check_budgets(batch)
        self.memory.begin(batch.copies)
        if batch.parts:
            self.flights.append(self.computed(batch))
        else:
            assert self.flights or self.is_idle, "nothing goes on"
        self.check()
        self.check_progress()

    def computed(self, batch: Batch) -> Flight:
        """Inputs and tables as the engine makes them; every query looks at its own sequence only."""
        sees_same_step = self.scheduler.sees_same_step
        work = []
        for part in batch.parts:
            sequence, start, stop = part.sequence, part.start, part.start + part.count
            assert sequence.pages is not None
            tables = self.tables[sequence.row]
            first = min(sequence.written, start // self.pool.page)
            for table, own in zip(tables, sequence.pages.held, strict=True):
                table[first : len(own)] = own[first:]
            sequence.written = len(sequence.pages.held[0])
            known = sequence.tokens[start:stop]
            inputs = known + [self.tokens[sequence.row]] * (part.count - len(known))
            tokens, values = self.truth(sequence, stop)
            assert inputs == tokens[start:stop]
            if not sees_same_step:
                self.memory.check(tables, start, start, values)
            work.append((part, tables, start, stop, values))
        for _, tables, start, stop, values in work:
            self.memory.write(tables, start, values[start:stop])
            if not sees_same_step:
                self.memory.check(tables, start, stop, values)
        flight = Flight([], [])
        for part, tables, start, stop, values in work:
            self.memory.check(tables, start, stop, values)
            (value,) = self.memory.read(0, tables[0], stop - 1, stop)
            for sequence in part.chosen:
                token = chosen_after(value, sequence.seed)
                flight.chosen.append((sequence, token))
                if sequence.row >= 0:
                    self.tokens[sequence.row] = token
            if part.sequence.scored:
                flight.scored.append((part.sequence, start, stop))
        return flight

    def truth(self, sequence: Sequence, stop: int) -> tuple[list[int], list[int]]:
        """The first tokens of a sequence if it were alone, and what pages hold for them."""
        prompt = tuple(sequence.tokens[: sequence.prompt])
        if (prompt, sequence.seed) not in self.values:
            self.values[prompt, sequence.seed] = list(prompt), histories(prompt)
        tokens, values = self.values[prompt, sequence.seed]
        while len(tokens) < stop:
            tokens.append(chosen_after(values[-1], sequence.seed))
            values.append(histories(tokens, values)[-1])
        return tokens, values

    def read(self) -> None:
        """What the oldest step in flight chose becomes known."""
        self.steps += 1
        if not self.flights:
            return
        flight = self.flights.popleft()
        for sequence, start, stop in flight.scored:
            if sequence.finish_reason is None:
                seen = self.scores.setdefault(sequence, set())
                seen.update(range(start, stop))
                if stop == sequence.last:
                    assert seen == set(range(sequence.last)), "every token is scored"
                    self.end(sequence, "length")
        for sequence, token in flight.chosen:
            if sequence.finish_reason is not None:
                continue
            sequence.pending -= 1
            sequence.tokens.append(token)
            if not self.scheduler.sees_same_step:
                self.scheduler.publish(sequence)
            if token == EOS:
                self.end(sequence, "stop")
            elif len(sequence.tokens) >= sequence.last:
                self.end(sequence, "length")
        self.check()

    def end(self, sequence: Sequence, reason: str) -> None:
        self.scheduler.finish(sequence, reason)
        self.seen[reason] += 1
        assert sequence.seed == self.seeds[sequence.request_id] + sequence.index
        if not sequence.scored:
            assert sequence.tokens == alone(sequence.tokens[: sequence.prompt], sequence.seed, sequence.last)

    def drain(self) -> None:
        """All requests come to their ends, and all pages back."""
        for _ in range(3000):
            if self.is_idle:
                break
            self.launch()
            self.read()
        assert self.is_idle and self.pool.free == self.pool.pages
        self.check()

    def check_budgets(self, batch: Batch) -> None:
        parts, scheduler = batch.parts, self.scheduler
        assert len({part.sequence for part in parts}) == len(parts)
        assert all(part.count > 0 and part.sequence in scheduler.running for part in parts)
        assert batch.tokens <= scheduler.step_tokens
        assert sum(part.count if part.sequence.scored else len(part.chosen) for part in parts) <= scheduler.step_rows
        targets = [copy.target for copy in batch.copies]
        assert len(set(targets)) == len(targets)

    def check_order(self, batch: Batch, before: dict[Sequence, int]) -> None:
        """Nobody gives pages back for a younger one, and nobody comes in while there is no room for one that runs."""
        running = self.scheduler.running
        gone = {sequence.arrival for sequence in before if sequence not in running}
        assert not gone or min(gone) >= min(sequence.arrival for sequence in before if sequence in running)
        forked = {sequence for part in batch.parts for sequence in part.chosen[1:]}
        if set(running) - set(before) - forked:
            served = {part.sequence for part in batch.parts}
            assert not batch.preempted
            assert all(s in served or not wanted or s.siblings for s, wanted in before.items())

    def check(self) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        self.pool.check([sequence.pages for sequence in running if sequence.pages is not None])
        rows = [sequence.row for sequence in running]
        assert len(set(rows)) == len(rows) <= self.most and all(0 <= row < self.most for row in rows)
        assert all(sequence.pages is None and sequence.row == -1 for sequence in waiting)
        for queue in (running, waiting):
            assert all(a.arrival <= b.arrival for a, b in pairwise(queue))
            assert all(sequence.finish_reason is None for sequence in queue)

    def check_progress(self) -> None:
        """The oldest request's samples come further again and again."""
        live = list(self.scheduler.sequences)
        oldest = min((sequence.arrival for sequence in live), default=-1)
        own = [sequence for sequence in live if sequence.arrival == oldest]
        mark = (
            oldest,
            sum(s.generated for s in own),
            sum(s.computed for s in own) * all(s.generated == 0 for s in own),
        )
        self.waited = 0 if mark[:1] != self.mark[:1] or mark > self.mark else self.waited + 1
        self.mark = mark if mark[:1] != self.mark[:1] else max(mark, self.mark)
        assert self.waited < PATIENCE, "the oldest request starves"


def walk(seed: int, steps: int) -> FakeEngine:
    """Some time of an engine, with what comes at random; then what is left comes to its end."""
    draw = random.Random(seed)
    engine = FakeEngine(
        draw.choice(WINDOWS), pages=draw.randint(3, 24), page=draw.randint(1, 4), step_tokens=draw.randint(1, 16),
        step_rows=draw.randint(1, 8), sequences=draw.randint(1, 6), ahead=draw.randint(0, 2), sees_same_step=draw.random() < 0.7,
        is_caching=draw.random() < 0.9,
    )  # fmt: skip
    scored = draw.choice([0.05, 0.2, 0.5])
    stems = [[draw.randint(1, 2) for _ in range(16)] for _ in range(2)]
    busy = draw.choice([0.1, 0.2, 0.35])
    while engine.steps < steps:
        kind = draw.random()
        if kind < busy and len(engine.scheduler.waiting) < 6:
            prompt = draw.choice(stems)[: draw.randint(0, 14)] + [draw.randint(1, 2) for _ in range(draw.randint(0, 3))]
            engine.add(prompt, draw.randint(1, 24), draw.randint(1, 3), draw.randint(0, 1), draw.random() < scored)
        elif kind < 0.37:
            engine.cancel(draw.randint(0, 20), draw.random() < 0.5)
        elif kind < 0.75:
            engine.launch()
        else:
            engine.read()
    engine.drain()
    return engine


@pytest.mark.parametrize("aligned", [1, 4])
def test_random_walks(monkeypatch: pytest.MonkeyPatch, aligned: int) -> None:
    monkeypatch.setattr(paging, "ALIGNED", aligned)
    engines = [walk(seed, STEPS) for seed in range(LIVES // 2)]
    assert sum(engine.steps for engine in engines) >= LIVES // 2 * STEPS
    seen = sum((engine.seen for engine in engines), Counter())
    rare = {kind for kind in KINDS if seen[kind] < 30}
    assert not rare, f"hardly ever happened: {rare}"


class Machine(RuleBasedStateMachine):
    """The same, so that what fails is made short."""

    engine: FakeEngine

    @initialize(
        windows=st.sampled_from(WINDOWS), pages=st.integers(3, 24), page=st.integers(1, 4), step_tokens=st.integers(1, 16),
        step_rows=st.integers(1, 8), sequences=st.integers(1, 6), ahead=st.integers(0, 2), sees_same_step=st.booleans(), is_caching=st.booleans(),
    )  # fmt: skip
    def make(self, windows: tuple[int | None, ...], **sizes: int) -> None:
        self.engine = FakeEngine(windows, **sizes)

    @precondition(lambda self: len(self.engine.scheduler.waiting) < 6)
    @rule(
        stem=st.integers(0, 14), end=st.lists(st.integers(1, 2), max_size=3), count=st.integers(1, 24), n=st.integers(1, 3),
        seed=st.integers(0, 1), scored=st.sampled_from([False, False, False, True]),
    )  # fmt: skip
    def add(self, stem: int, end: list[int], count: int, n: int, seed: int, scored: bool) -> None:
        self.engine.add([1] * stem + end, count, n, seed, scored)

    @rule(which=st.integers(0, 20), whole=st.booleans())
    def cancel(self, which: int, whole: bool) -> None:
        self.engine.cancel(which, whole)

    @rule(times=st.integers(1, 4))
    def launch(self, times: int) -> None:
        for _ in range(times):
            self.engine.launch()

    @rule()
    def read(self) -> None:
        self.engine.read()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()


class TestMachine(Machine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)

    @pytest.fixture(autouse=True)
    def aligned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paging, "ALIGNED", 2)


def test_samples_to_come_keep_their_rows() -> None:
    """A scored text leaves one row of logits, so that samples are made a step later; nobody takes their rows until then."""
    engine = FakeEngine((None,), pages=64, page=4, step_tokens=32, step_rows=4, sequences=4)
    engine.add([1] * 6, 1, 1, 0, scored=True)
    engine.add([1, 2], 4, 3, 0, scored=False)
    for _ in range(3):
        engine.add([2], 4, 1, 0, scored=False)
    engine.drain()
    assert engine.seen["length"] + engine.seen["stop"] == 7


@pytest.mark.parametrize("prompt", [8, 7])
def test_forks_copy_the_page_that_is_not_full(prompt: int) -> None:
    engine = FakeEngine((None, 3), pages=64, page=4, step_tokens=32, step_rows=4, sequences=3)
    engine.add([1] * prompt, 8, 3, 0, scored=False)
    engine.launch()
    assert engine.pool.used == 4  # two of each group
    engine.launch()
    assert engine.seen["copied"] == (0 if prompt == 8 else 4)  # the last of three writes where all were
    engine.drain()


def test_equal_prompts_of_one_step_share() -> None:
    """The second reads pages that the first writes in the same step, if kernels write before they read."""
    for sees_same_step in (True, False):
        engine = FakeEngine(
            (None,), pages=64, page=4, step_tokens=32, step_rows=4, sequences=2, sees_same_step=sees_same_step
        )
        for _ in range(2):
            engine.add([1] * 9, 4, 1, 0, scored=False)
        engine.launch()
        assert engine.pool.used == (4 if sees_same_step else 6)
        engine.drain()
