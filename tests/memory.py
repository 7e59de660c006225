"""What the pages of a pool hold, modelled: for each token a number that stands for it and for all tokens before it."""

from collections.abc import Sequence
from typing import Any

from fuser.runtime.paging import NOWHERE, Copy, Group, Pages, Pool

POISON = -1  # what a page holds that belongs to nobody, and the rest of one that was just taken


def histories(tokens: Sequence[int], known: Sequence[int] = ()) -> list[int]:
    """A number for each token that tells it and all tokens before it; `known` are those of the first tokens."""
    found = list(known)
    for token in tokens[len(found) :]:
        found.append(abs(hash((found[-1] if found else 0, token))))
    return found


class TracedPool(Pool):
    """A pool that notes which pages were taken."""

    def __init__(self, pages: int, page: int, groups: Sequence[Group], *, prefix_caching: bool = True) -> None:
        self.taken: list[int] = []
        super().__init__(pages, page, groups, prefix_caching=prefix_caching)

    def _take(self) -> int:
        page = super()._take()
        self.taken.append(page)
        return page

    @property
    def lost(self) -> list[int]:
        """Pages whose content nobody may read any more: those of nobody, unless they are kept for their prefix."""
        return [page for page in range(1, self.pages + 1) if not self.counts[page] and page not in self._known]

    def is_known(self, page: int) -> bool:
        return page in self._known


class Memory:
    """The contents of a pool's pages. A group's layers write their own numbers: pages of groups are not interchangeable."""

    def __init__(self, pool: TracedPool) -> None:
        self.pool = pool
        self.cells = [[POISON] * pool.page for _ in range(pool.pages + 1)]

    def begin(self, copies: Sequence[Copy]) -> None:
        """What comes before a step: all copies' sources are read, what was given back is poisoned, targets are written."""
        sources = [list(self.cells[copy.source]) for copy in copies]
        for page in [*self.pool.taken, *self.pool.lost]:
            self.cells[page] = [POISON] * self.pool.page
        self.pool.taken.clear()
        for copy, source in zip(copies, sources, strict=True):
            self.cells[copy.target] = source

    def write(self, tables: Sequence[Sequence[int]], start: int, values: Sequence[int]) -> None:
        """Writes what tokens from `start` on have; no cell is written twice, so none of another's either."""
        for g, table in enumerate(tables):
            for position, value in enumerate(values, start):
                page, cell = table[position // self.pool.page], position % self.pool.page
                assert page != NOWHERE and self.pool.counts[page]
                assert self.cells[page][cell] == POISON, f"page {page} holds another token at {cell}"
                self.cells[page][cell] = value + g

    def read(self, g: int, table: Sequence[int], start: int, stop: int) -> list[int]:
        """What the layers of a group see at the positions start .. stop."""
        size = self.pool.page
        first = start // size
        found = [value for page in table[first : -(-stop // size)] for value in self.cells[page]]
        return found[start - first * size : stop - first * size]

    def check(self, tables: Sequence[Sequence[int]], position: int, stop: int, values: Sequence[int]) -> None:
        """Queries from `position` on see exactly `values` at every position before `stop` that they look at."""
        for g, group in enumerate(self.pool.groups):
            first = group.first(position)
            seen = self.read(g, tables[g], first, stop)
            assert seen == [value + g for value in values[first:stop]], f"group {g} sees {seen} from {first} on"


def held(pages: Pages) -> list[int]:
    """The pages that a sequence holds."""
    return [page for first, own in zip(pages.first, pages.held, strict=True) for page in own[first:]]


def spoiled(llm: Any) -> None:
    """Makes an LLM fill every page with NaN once it is let go of or taken: before the next step, and after its copies."""
    pool, runner = llm.engine.pool, llm.runner
    drop, take, copy, run = pool._drop, pool._take, runner.copy, runner.run
    waiting: set[int] = set()

    def dropped(page: int) -> None:
        drop(page)
        if not pool.counts[page] and page not in pool._known:
            waiting.add(page)

    def taken() -> int:
        page: int = take()
        waiting.add(page)
        return page

    def copied(sources: Sequence[int], targets: Sequence[int]) -> None:
        copy(sources, targets)
        waiting.difference_update(targets)

    def ran(step: Any) -> Any:
        for cache in runner.stepper.caches.values():
            for tensor in cache.values():
                tensor[sorted(waiting)] = float("nan") if tensor.is_floating_point() else -128
        waiting.clear()
        return run(step)

    pool._drop, pool._take, runner.copy, runner.run = dropped, taken, copied, ran
