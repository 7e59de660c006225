"""The books of the paged cache: random sequences of what can be done with a pool, against a model of what its pages hold."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fuser.errors import UsageError
from fuser.runtime import paging
from fuser.runtime.paging import Group, Pages, Pool, layer_groups
from tests.memory import Memory, TracedPool, held, histories

LIVES, STEPS = 700, 150  # of the seeded walk
WINDOWS = ((None,), (3,), (None, 2), (5, None), (1, 4), (None, None, 6))


@dataclass(eq=False)
class Row:
    """A sequence as the model knows it."""

    tokens: list[int]
    values: list[int]
    pages: Pages
    computed: int


class Model:
    """A pool, what its pages hold, and the sequences that hold them. Arguments choose; any number is valid."""

    def __init__(self, pages: int, page: int, windows: tuple[int | None, ...], is_caching: bool) -> None:
        groups = [Group(window, (i,)) for i, window in enumerate(windows)]
        self.pool = TracedPool(max(pages, len(groups)), page, groups, prefix_caching=is_caching)
        self.memory = Memory(self.pool)
        self.rows: list[Row] = []
        self.steps = self.refused = self.hits = self.copied = 0

    def begin(self, tokens: list[int], like: int, shared: int) -> None:
        """A sequence comes; its first tokens may be another's."""
        if self.rows:
            tokens = self.rows[like % len(self.rows)].tokens[:shared] + tokens
        pages, length = self.pool.matched(tokens)
        assert length < len(tokens) and length % self.pool.page == 0
        self.hits += length > 0
        self.rows.append(Row(tokens, histories(tokens), pages, length))

    def compute(self, which: int, count: int, token: int) -> None:
        """The next tokens of a sequence are computed, or one more is chosen and computed."""
        row = self.rows[which % len(self.rows)]
        if row.computed == len(row.tokens):
            row.tokens.append(token)
            row.values = histories(row.tokens, row.values)
        start, stop = row.computed, min(row.computed + count, len(row.tokens))
        self.pool.passed(row.pages, start)
        before = [list(own) for own in row.pages.held], list(self.pool.counts), self.pool.free
        copies = self.pool.extend(row.pages, start, stop)
        if copies is None:
            blocks = -(-stop // self.pool.page) - len(row.pages.held[0])
            shared = sum(
                self.pool.counts[own[start // self.pool.page]] > 1 for own in row.pages.held if start % self.pool.page
            )
            assert blocks * len(self.pool.groups) + shared > self.pool.free
            assert before == (row.pages.held, self.pool.counts, self.pool.free), "what is refused changes nothing"
            self.refused += 1
            return
        self.copied += len(copies)
        self.memory.begin(copies)
        for own in row.pages.held:
            for page in own[start // self.pool.page :]:
                assert self.pool.counts[page] == 1 and not self.pool.is_known(page), f"page {page} is others' too"
        self.memory.write(row.pages.held, start, row.values[start:stop])
        row.computed = stop
        self.memory.check(row.pages.held, start, stop, row.values)

    def publish(self, which: int) -> None:
        row = self.rows[which % len(self.rows)]
        self.pool.publish(row.pages, row.tokens, row.computed)

    def passed(self, which: int) -> None:
        row = self.rows[which % len(self.rows)]
        self.pool.passed(row.pages, row.computed)

    def fork(self, which: int) -> None:
        row = self.rows[which % len(self.rows)]
        self.rows.append(Row(list(row.tokens), list(row.values), self.pool.fork(row.pages), row.computed))

    def release(self, which: int) -> None:
        row = self.rows.pop(which % len(self.rows))
        self.pool.release(row.pages)
        assert not held(row.pages)

    def check(self) -> None:
        """The books are right, and each sequence sees its own tokens and no others."""
        self.steps += 1
        self.memory.begin([])
        self.pool.check([row.pages for row in self.rows])
        assert self.pool.free + self.pool.used == self.pool.pages
        for row in self.rows:
            self.memory.check(row.pages.held, row.computed, row.computed, row.values)

    def end(self) -> None:
        while self.rows:
            self.release(0)
        self.check()
        assert self.pool.free == self.pool.pages and not self.pool.used


def walk(seed: int, steps: int) -> Model:
    """A life of a small pool."""
    draw = random.Random(seed)
    model = Model(draw.randint(2, 16), draw.randint(1, 4), draw.choice(WINDOWS), draw.random() < 0.9)
    for _ in range(steps):
        kind = draw.random()
        if not model.rows or (kind < 0.15 and len(model.rows) < 5):
            model.begin(
                [draw.randint(0, 1) for _ in range(draw.randint(1, 9))], draw.randint(0, 7), draw.randint(0, 12)
            )
        elif kind < 0.6:
            model.compute(draw.randint(0, 7), draw.randint(1, 6), draw.randint(0, 1))
        elif kind < 0.75:
            model.publish(draw.randint(0, 7))
        elif kind < 0.82:
            model.passed(draw.randint(0, 7))
        elif kind < 0.88 and len(model.rows) < 6:
            model.fork(draw.randint(0, 7))
        elif model.rows:
            model.release(draw.randint(0, 7))
        model.check()
    model.end()
    return model


@pytest.mark.parametrize("aligned", [1, 4])
def test_random_walks(monkeypatch: pytest.MonkeyPatch, aligned: int) -> None:
    monkeypatch.setattr(paging, "ALIGNED", aligned)
    models = [walk(seed, STEPS) for seed in range(LIVES // 2)]
    assert sum(model.steps for model in models) >= LIVES // 2 * STEPS
    assert sum(model.hits for model in models) > 1000 and sum(model.refused for model in models) > 1000
    assert sum(model.copied for model in models) > 500


class Machine(RuleBasedStateMachine):
    """The same, so that what fails is made short."""

    model: Model
    which = st.integers(0, 7)

    @initialize(
        pages=st.integers(2, 16), page=st.integers(1, 4), windows=st.sampled_from(WINDOWS), is_caching=st.booleans()
    )
    def make(self, pages: int, page: int, windows: tuple[int | None, ...], is_caching: bool) -> None:
        self.model = Model(pages, page, windows, is_caching)

    @property
    def is_busy(self) -> bool:
        return bool(self.model.rows)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), like=which, shared=st.integers(0, 12))
    def begin(self, tokens: list[int], like: int, shared: int) -> None:
        self.model.begin(tokens, like, shared)

    @precondition(lambda self: self.is_busy)
    @rule(which=which, count=st.integers(1, 6), token=st.integers(0, 1))
    def compute(self, which: int, count: int, token: int) -> None:
        self.model.compute(which, count, token)

    @precondition(lambda self: self.is_busy)
    @rule(which=which)
    def publish(self, which: int) -> None:
        self.model.publish(which)

    @precondition(lambda self: self.is_busy)
    @rule(which=which)
    def passed(self, which: int) -> None:
        self.model.passed(which)

    @precondition(lambda self: self.is_busy)
    @rule(which=which)
    def fork(self, which: int) -> None:
        self.model.fork(which)

    @precondition(lambda self: self.is_busy)
    @rule(which=which)
    def release(self, which: int) -> None:
        self.model.release(which)

    @invariant()
    def check(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.end()


class TestMachine(Machine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)

    @pytest.fixture(autouse=True)
    def aligned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paging, "ALIGNED", 2)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("aligned", [1, 4, 6])
def test_the_longest_sequence_fits_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, windows: tuple[int | None, ...], aligned: int
) -> None:
    monkeypatch.setattr(paging, "ALIGNED", aligned)
    for pages in range(3, 15):
        for page in (1, 3, 4):
            for chunk in (1, 2, 5, 11):
                pool = Pool(pages, page, [Group(window, (i,)) for i, window in enumerate(windows)])

                def fits(length: int, pool: Pool = pool, chunk: int = chunk) -> bool:
                    """Whether there is room for every chunk that a step may have to compute."""
                    return all(pool.needed(start, min(start + chunk, length)) <= pool.pages for start in range(length))

                found = pool.longest(40, chunk)
                assert fits(found) and (found == 40 or not fits(found + 1))


def test_windows_hold_what_they_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a prefix hit a group with a window holds the last pages only, and they suffice when the first are gone."""
    monkeypatch.setattr(paging, "ALIGNED", 1)
    pool = Pool(16, 2, [Group(None, (0,)), Group(3, (1,))])
    tokens = list(range(9))
    pages, _ = pool.matched(tokens)
    assert pool.extend(pages, 0, 8) == []
    pool.publish(pages, tokens, 8)
    pool.passed(pages, 8)
    assert [own.count(paging.NOWHERE) for own in pages.held] == [0, 3]
    again, length = pool.matched(tokens)
    assert length == 8 and again.held == pages.held and again.first == [0, 3]
    other, length = pool.matched(tokens[:5])
    assert length == 4 and other.first == [0, 1]
    pool.check([pages, again, other])


def test_a_prefix_outlives_the_page_it_was_found_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence builds on a prefix whose page was another's, which is taken: what it publishes is found all the same."""
    monkeypatch.setattr(paging, "ALIGNED", 1)
    pool = Pool(5, 1, [Group(1, (0,))])
    first, second = pool.new(), pool.new()
    for pages in (first, second):
        pool.extend(pages, 0, 1)
        pool.publish(pages, [7], 1)
    pool.release(first)
    taken = pool.new()
    pool.extend(taken, 0, 4)
    pool.release(taken)
    pool.passed(second, 1)
    pool.extend(second, 1, 2)
    pool.publish(second, [7, 8], 2)
    assert pool.matched([7, 8, 9])[1] == 2


def test_what_is_kept_goes_by_its_age() -> None:
    pool = Pool(4, 1, [Group(None, (0,))])
    for tokens in ([1, 2], [3, 4]):
        pages = pool.new()
        pool.extend(pages, 0, 2)
        pool.publish(pages, tokens, 2)
        pool.release(pages)
    assert pool.free == 4
    pool.extend(pool.new(), 0, 1)
    assert [pool.matched([*tokens, 0])[1] for tokens in ([1, 2], [3, 4])] == [1, 2]


def test_groups() -> None:
    assert [(group.window, group.layers) for group in layer_groups([None, 4, 4, None, 4, 4])] == [
        (None, (0, 3)),
        (4, (1, 2)),
        (4, (4, 5)),
    ]
    assert layer_groups([]) == []
    with pytest.raises(UsageError, match="a page for each of 2 groups"):
        Pool(1, 4, [Group(None, (0,)), Group(4, (1,))])
