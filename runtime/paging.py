"""The books of a paged KV cache: which page holds which tokens of which sequence, shared where prefixes are equal. No tensors.

Layers that see equally far share one block table, and as many layers as the smallest kind has make a group. A page holds
`page` tokens of one group's layers; pages of all groups come from one pool, so that what layers with a window leave free
serves the others (as in vLLM's hybrid cache). A group with a window holds the pages that its window still reaches.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lcm

from fuser.errors import UsageError

NOWHERE = 0  # in a block table: a page that nothing looks at any more
ALIGNED = 64  # kernels read the keys of a window from a multiple of at most so many


@dataclass(frozen=True)
class Group:
    """Layers with one block table: `window` as they see it (None: everything), `layers` by their index."""

    window: int | None
    layers: tuple[int, ...]

    def first(self, position: int) -> int:
        """The first position that is still read when the query at `position` is computed."""
        return 0 if self.window is None else max(position + 1 - self.window, 0) // ALIGNED * ALIGNED


def layer_groups(windows: Sequence[int | None]) -> list[Group]:
    """Groups of about one size, of layers that see equally far."""
    counts = Counter(windows)
    fewest, most = min(counts.values(), default=1), max(counts.values(), default=1)
    size = most if most < 1.5 * fewest else fewest
    found = []
    for window in counts:
        layers = [i for i, other in enumerate(windows) if other == window]
        found += [Group(window, tuple(layers[i : i + size])) for i in range(0, len(layers), size)]
    return found


@dataclass(eq=False)
class Prefix:
    """A full page's tokens after all those before them: a node of the tree of known prefixes."""

    parent: "Prefix | None"
    tokens: tuple[int, ...]
    pages: list[int | None]  # by group; None where it is not held (any more)
    children: dict[tuple[int, ...], "Prefix"] = field(default_factory=dict)
    sequences: int = 0  # how many have published just so much (not counted at the root)

    @property
    def is_needed(self) -> bool:
        return bool(self.children or self.sequences) or any(page is not None for page in self.pages)


@dataclass(eq=False)
class Pages:
    """The pages of one sequence: by group, for each `page` tokens, NOWHERE where its window has passed."""

    held: list[list[int]]
    first: list[int]  # by group, how many pages at the beginning are not held any more
    known: Prefix  # of the full pages that others can find
    depth: int = 0  # how many those are


@dataclass(frozen=True)
class Copy:
    """A page that has to be copied before a step: it was shared, and is written to."""

    source: int
    target: int


class Pool:
    """Pages by number, 1 to `pages`; page 0 belongs to nobody.

    A page is free, or held by one sequence or more, or kept for its prefix until its place is needed, the longest unused
    first.
    """

    def __init__(self, pages: int, page: int, groups: Sequence[Group], *, prefix_caching: bool = True) -> None:
        if pages < len(groups) or page < 1 or not groups:
            raise UsageError(f"the cache needs a page for each of {len(groups)} groups of layers, it has {pages}")
        self.pages, self.page, self.groups = pages, page, tuple(groups)
        self.prefix_caching = prefix_caching
        self.counts = [0] * (pages + 1)  # how many sequences hold a page
        self.root = Prefix(None, (), [None] * len(groups))
        self._free = list(range(pages, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, but known
        self._known: dict[int, tuple[Prefix, int]] = {}  # page -> the prefix it ends, and its group

    @property
    def free(self) -> int:
        """How many pages can be taken."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """How many pages sequences hold."""
        return self.pages - self.free

    def needed(self, start: int, stop: int) -> int:
        """The most pages that a sequence holds while its tokens start .. stop are computed."""
        return sum(-(-stop // self.page) - group.first(start) // self.page for group in self.groups)

    def longest(self, most: int, chunk: int) -> int:
        """The longest sequence, of at most `most` tokens, that the pool can hold alone, computed in chunks of any sizes.

        How many pages windows reach depends on where a chunk starts, and comes again (or grows) with each period.
        """
        period = lcm(ALIGNED, self.page)
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            starts = range(max(middle - chunk - period, 0), max(middle - chunk, 0) + 1)
            peak = max(self.needed(start, min(start + chunk, middle)) for start in starts)
            low, high = (middle, high) if peak <= self.pages else (low, middle - 1)
        return low

    def new(self) -> Pages:
        """The pages of a sequence that holds none."""
        return Pages([[] for _ in self.groups], [0] * len(self.groups), self.root)

    def matched(self, tokens: Sequence[int]) -> tuple[Pages, int]:
        """The pages of the longest known prefix of `tokens`, now held by one more, and how many tokens it has.

        At least the last token is left to be computed.
        """
        path = [self.root]
        while self.prefix_caching and (len(path)) * self.page < len(tokens):
            part = tuple(tokens[(len(path) - 1) * self.page : len(path) * self.page])
            found = path[-1].children.get(part)
            if found is None:
                break
            path.append(found)
        length = next(n for n in range(len(path) - 1, -1, -1) if self._is_held(path, n))
        path[length].sequences += 1
        made = Pages([], [], path[length], length)
        for g, group in enumerate(self.groups):
            first = group.first(length * self.page) // self.page
            own = [prefix.pages[g] for prefix in path[1 + first : 1 + length]]
            for page in own:
                assert page is not None
                self._hold(page)
            made.held.append([NOWHERE] * first + [page for page in own if page is not None])
            made.first.append(first)
        return made, length * self.page

    def _is_held(self, path: list[Prefix], length: int) -> bool:
        """Whether all that a query after so many pages looks at is there."""
        return all(
            path[1 + i].pages[g] is not None
            for g, group in enumerate(self.groups)
            for i in range(group.first(length * self.page) // self.page, length)
        )

    def extend(self, pages: Pages, start: int, stop: int) -> list[Copy] | None:
        """Makes room for the tokens start .. stop; what is to be copied before they are written. None: too few are free."""
        count, whole = -(-stop // self.page), start // self.page
        shared = [
            (g, i)
            for g, held in enumerate(pages.held)
            for i in range(max(whole, pages.first[g]), len(held))
            if self.counts[held[i]] > 1 or held[i] in self._known
        ]
        if sum(max(count - len(held), 0) for held in pages.held) + len(shared) > self.free:
            return None
        copies = []
        for g, i in shared:
            source = pages.held[g][i]
            pages.held[g][i] = target = self._take()
            copies.append(Copy(source, target))
            self._drop(source)
        for held in pages.held:
            held += [self._take() for _ in range(count - len(held))]
        return copies

    def publish(self, pages: Pages, tokens: Sequence[int], computed: int) -> None:
        """Lets others find the full pages of the first `computed` tokens; those known before stay what is found."""
        count = min(len(tokens), computed) if self.prefix_caching else 0
        while (pages.depth + 1) * self.page <= count:
            part = tuple(tokens[pages.depth * self.page : (pages.depth + 1) * self.page])
            found = pages.known.children.get(part)
            if found is None:
                found = pages.known.children[part] = Prefix(pages.known, part, [None] * len(self.groups))
            for g, held in enumerate(pages.held):
                if pages.first[g] <= pages.depth and found.pages[g] is None:
                    found.pages[g] = held[pages.depth]
                    self._known[held[pages.depth]] = found, g
            found.sequences += 1
            pages.known.sequences -= 1
            pages.known = found
            pages.depth += 1

    def passed(self, pages: Pages, position: int) -> None:
        """Lets go of what windows do not reach any more once the query at `position` is the next."""
        for g, (group, held) in enumerate(zip(self.groups, pages.held, strict=True)):
            stop = min(group.first(position) // self.page, len(held))
            for i in range(pages.first[g], stop):
                self._drop(held[i])
                held[i] = NOWHERE
            pages.first[g] = max(pages.first[g], stop)

    def fork(self, pages: Pages) -> Pages:
        """The same pages for one more sequence."""
        for first, held in zip(pages.first, pages.held, strict=True):
            for page in held[first:]:
                self._hold(page)
        pages.known.sequences += 1
        return Pages([list(held) for held in pages.held], list(pages.first), pages.known, pages.depth)

    def release(self, pages: Pages) -> None:
        """Gives all pages of a sequence back; what is known is kept as long as there is room, its end the shortest."""
        for g, held in enumerate(pages.held):
            for page in reversed(held[pages.first[g] :]):
                self._drop(page)
            held.clear()
            pages.first[g] = 0
        pages.known.sequences -= 1
        self._forget(pages.known)
        pages.known, pages.depth = self.root, 0

    def _hold(self, page: int) -> None:
        if not self.counts[page]:
            del self._kept[page]
        self.counts[page] += 1

    def _drop(self, page: int) -> None:
        assert self.counts[page] > 0, f"page {page} is freed twice"
        self.counts[page] -= 1
        if not self.counts[page]:
            if page in self._known:
                self._kept[page] = None
            else:
                self._free.append(page)

    def _take(self) -> int:
        """A page of nobody; if need be the longest unused that was kept, which nobody finds from now on."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            prefix, g = self._known.pop(page)
            prefix.pages[g] = None
            self._forget(prefix)
        self.counts[page] = 1
        return page

    def _forget(self, prefix: Prefix) -> None:
        """Takes prefixes out of the tree that no page, no sequence and no longer prefix needs."""
        while prefix.parent is not None and not prefix.is_needed:
            del prefix.parent.children[prefix.tokens]
            prefix = prefix.parent

    def check(self, sequences: Sequence[Pages]) -> None:
        """Raises AssertionError unless the books are right when exactly these sequences hold pages."""
        counts = [0] * (self.pages + 1)
        for pages in sequences:
            for first, held in zip(pages.first, pages.held, strict=True):
                assert held[:first] == [NOWHERE] * first
                for page in held[first:]:
                    counts[page] += 1
        assert counts == self.counts, "pages are counted wrongly"
        idle = [page for page in range(1, self.pages + 1) if not counts[page]]
        assert sorted([*self._free, *self._kept]) == idle, "a page is lost or doubled"
        assert all(page in self._known for page in self._kept)
        tree = [self.root]
        for prefix in tree:
            tree += prefix.children.values()
        found = {page: (prefix, g) for prefix in tree for g, page in enumerate(prefix.pages) if page is not None}
        assert found == self._known, "what is known is not what is found"
        assert all(len(prefix.tokens) == self.page for prefix in tree[1:]), "a page is known before its tokens are"
        ends = Counter(pages.known for pages in sequences)
        assert all(prefix.sequences == ends[prefix] and prefix.is_needed for prefix in tree[1:]), "a prefix is left"
