"""Continuous batching: which tokens of which sequences the next step computes, and who has to give pages back for it.

Sequences that generate come first, a token each; what is left of a step's budget goes to prompts, in chunks, in the order in
which they came. Where the pool is full the youngest sequence gives its pages back, and is computed again later.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from sys import maxsize

from fuser.runtime.paging import Copy, Pages, Pool
from fuser.runtime.parameters import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One sample of one request: its tokens, and how far they are computed."""

    request_id: str
    index: int  # which sample of the request
    tokens: list[int]  # prompt and output, as far as they are known
    prompt: int  # how many of them are the prompt
    params: SamplingParams
    seed: int
    last: int  # so many tokens at most
    scored: bool = False  # logits of every token are asked for, and none is chosen
    arrival: int = -1
    computed: int = 0  # tokens whose keys and values are in pages, or will be by the steps that were launched
    pending: int = 0  # tokens that were chosen on the device and are not read yet
    pages: Pages | None = None
    row: int = -1  # of the device's arrays, while it runs
    siblings: int = 0  # samples of the request that are to be made of it once its prompt is computed
    written: int = 0  # how many pages of each group the block table has
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def generated(self) -> int:
        """How many tokens are chosen."""
        return self.length - self.prompt

    @property
    def wanted(self) -> int:
        """How many tokens are to be computed next."""
        if self.finish_reason is not None or (self.length >= self.last and not self.scored):
            return 0
        return self.length - self.computed


@dataclass(eq=False)
class Part:
    """`count` tokens of a sequence from `start` on; `chosen` are the sequences that have a token chosen after them."""

    sequence: Sequence
    start: int
    count: int
    chosen: list[Sequence] = field(default_factory=list)


@dataclass
class Batch:
    """What one step computes; `copies` come before it."""

    parts: list[Part] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    preempted: int = 0

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)


class Scheduler:
    """The sequences that wait and those that run, both in the order in which their requests came."""

    def __init__(
        self, pool: Pool, *, step_tokens: int, step_rows: int, sequences: int, sees_same_step: bool = True
    ) -> None:
        """
        Args:
            step_tokens: the most tokens of a step; at least `sequences`.
            step_rows: the most tokens of a step whose logits are computed; at least `sequences`.
            sequences: the most that run at once.
            sees_same_step: whether what a step writes to pages can be read by other sequences of the step.
        """
        self.pool, self.step_tokens, self.step_rows = pool, step_tokens, step_rows
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.sees_same_step = sees_same_step
        self.preemptions = 0
        self._rows = list(range(sequences - 1, -1, -1))
        self._arrivals = count()

    @property
    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = next(self._arrivals)
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Takes a sequence out, in whatever state it is; a second time nothing happens."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence in self.running:
            self.running.remove(sequence)
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> Batch:
        """The next step's batch; empty if nothing can be computed before what was launched is read."""
        batch = Batch()
        scheduled: set[Sequence] = set()
        room = [self.step_tokens, self.step_rows]
        is_blocked = False
        for wanted in (range(1, 2), range(2, maxsize)):  # those that generate, then prompts
            for sequence in [s for s in self.running if s.wanted in wanted]:
                if sequence.pages is None or sequence in scheduled:
                    continue  # it was preempted for one before it
                while room[0] and not self._continued(sequence, batch, room):
                    victim = next((s for s in reversed(self.running) if s not in scheduled and s is not sequence), None)
                    if victim is None or victim.arrival < sequence.arrival:
                        is_blocked = True
                        break
                    self._preempt(victim, batch)
                scheduled.update(part.sequence for part in batch.parts[-1:])
        if not is_blocked and not batch.preempted:
            self._admit(batch, room)
        return batch

    def _admit(self, batch: Batch, room: list[int]) -> None:
        """Takes up those that wait, the first first, as long as there is room."""
        while self.waiting and all(room):
            sequence = self.waiting[0]
            reserved = sum(other.siblings for other in self.running)
            if sequence.pending or len(self._rows) <= sequence.siblings + reserved:
                return
            if self.running and self.pool.free < len(self.running) * len(self.pool.groups):
                return  # those that run need a page soon
            if sequence.scored:
                sequence.pages, sequence.computed = self.pool.new(), 0
            else:
                sequence.pages, sequence.computed = self.pool.matched(sequence.tokens)
            sequence.row, sequence.written = self._rows.pop(), 0
            insort(self.running, sequence, key=lambda s: s.arrival)
            if not self._continued(sequence, batch, room):
                self.running.remove(sequence)
                self._leave(sequence)
                return
            self.waiting.pop(0)

    def _continued(self, sequence: Sequence, batch: Batch, room: list[int]) -> bool:
        """Adds a sequence's next tokens to a batch; False if there are no pages for them."""
        assert sequence.pages is not None
        start = sequence.computed
        size = min(sequence.wanted, room[0], *[room[1]] * sequence.scored)
        is_last = start + size == sequence.length
        rows = size if sequence.scored else (1 + sequence.siblings) * is_last
        if rows > room[1]:
            size, rows, is_last = size - 1, 0, False  # the last token waits for a step with room for what it chooses
        if size <= 0:
            return True
        self.pool.passed(sequence.pages, start)
        copies = self.pool.extend(sequence.pages, start, start + size)
        if copies is None:
            return False
        batch.copies += copies
        part = Part(sequence, start, size)
        batch.parts.append(part)
        sequence.computed = start + size
        if self.sees_same_step:
            self.publish(sequence)
        room[0] -= size
        room[1] -= rows
        if is_last and not sequence.scored:
            part.chosen = [sequence, *self._forked(sequence)]
            for chosen in part.chosen:
                chosen.pending += 1
        return True

    def publish(self, sequence: Sequence) -> None:
        """Lets others find what is computed of a sequence's known tokens."""
        if sequence.pages is not None and not sequence.scored:
            self.pool.publish(sequence.pages, sequence.tokens, sequence.computed)

    def _forked(self, sequence: Sequence) -> list[Sequence]:
        """The other samples of a request, which share the pages of its prompt."""
        assert sequence.pages is not None
        made = []
        for i in range(sequence.siblings):
            other = Sequence(
                sequence.request_id, sequence.index + 1 + i, list(sequence.tokens), sequence.prompt, sequence.params,
                sequence.seed + 1 + i, sequence.last, arrival=sequence.arrival, computed=sequence.computed,
                pages=self.pool.fork(sequence.pages), row=self._rows.pop(),
            )  # fmt: skip
            insort(self.running, other, key=lambda s: s.arrival)
            made.append(other)
        sequence.siblings = 0
        return made

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        """Gives a sequence's pages back; it waits, by its age, to be computed again."""
        self.running.remove(sequence)
        self._leave(sequence)
        sequence.computed = 0
        insort(self.waiting, sequence, key=lambda s: s.arrival)
        batch.preempted += 1
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.pages is not None
        self.publish(sequence)
        self.pool.release(sequence.pages)
        self._rows.append(sequence.row)
        sequence.pages, sequence.row = None, -1
