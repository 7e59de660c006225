"""Layered drawings (Sugiyama, Tagawa, Toda 1981): boxes in ranks, edges downwards past the boxes in between.

Ranks and coordinates are found here; the order within ranks by fast-sugiyama where it is installed, else by sweeps of
barycentres.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

GAP_X = 14.0
GAP_Y = 36.0
MARGIN = 14.0
LONGEST = 40  # ranks that an edge is led through; a longer one is drawn straight
SWEEPS = 6
STRAIGHTEN = 6  # sweeps that move boxes beneath what they read and above what reads them

Ranks: TypeAlias = list[list[int]]  # of vertices: boxes first, then the points that edges pass
Link: TypeAlias = tuple[int, int]
Ordering: TypeAlias = Callable[[Ranks, Sequence[Link]], Ranks]


@dataclass
class Drawing:
    """Centres of boxes, and for each edge the points that it passes, in px."""

    width: float
    height: float
    centres: list[tuple[float, float]]
    bends: list[tuple[float, ...]]


@dataclass
class _Proper:
    """Boxes and points in ranks, linked from one rank to the next only."""

    ranks: Ranks
    links: list[Link] = field(default_factory=list)
    chains: list[list[int]] = field(default_factory=list)  # the points that each edge passes


def drawing(
    sizes: Sequence[tuple[float, float]],
    edges: Sequence[Link],
    *,
    first: Collection[int] = (),
    last: Collection[int] = (),
    ordering: Ordering | None = None,
) -> Drawing:
    """Draws boxes. Edges that would close a circle are drawn, but not followed.

    Args:
        sizes: the width and height of each, in px.
        edges: from box to box, each pair once.
        first, last: boxes without a size that stand for what comes in at the top and what leaves at the bottom.
        ordering: how the order within ranks is found; by default the best there is.
    """
    centres: list[tuple[float, float]] = [(0.0, 0.0)] * len(sizes)
    bends: list[tuple[float, ...]] = [()] * len(edges)
    parts = _parts(len(sizes), edges)
    drawn = []
    for vertices, numbers in parts:
        local = {vertex: number for number, vertex in enumerate(vertices)}
        ends = [{local[vertex] for vertex in side if vertex in local} for side in (first, last)]
        links = [(local[a], local[b]) for a, b in (edges[number] for number in numbers)]
        drawn.append(_drawn([sizes[v] for v in vertices], links, ends[0], ends[1], ordering or best_ordering()))
    tallest = max((part.height for part in drawn), default=2 * MARGIN)
    left = top = widest = 0.0
    placed = sorted(
        zip(parts, drawn, strict=True), key=lambda pair: -pair[1].height
    )  # the trunk, then what is beside it
    for (vertices, numbers), part in placed:
        if first or last or top + part.height > tallest:  # what comes in or leaves needs the whole height
            left, top, widest = left + widest, 0.0, 0.0
        for vertex, (x, y) in zip(vertices, part.centres, strict=True):
            centres[vertex] = (round(x + left, 1), round(y + top, 1))
        for number, points in zip(numbers, part.bends, strict=True):
            moved = (round(c + (top if place % 2 else left), 1) for place, c in enumerate(points))
            bends[number] = tuple(moved)
        top, widest = top + part.height, max(widest, part.width)
    return Drawing(round(left + max(widest, 2 * MARGIN), 1), round(tallest, 1), centres, bends)


def _parts(count: int, edges: Sequence[Link]) -> list[tuple[list[int], list[int]]]:
    """The connected parts: their boxes and their edges, in the order of their first boxes."""
    roots = list(range(count))

    def root(vertex: int) -> int:
        while roots[vertex] != vertex:
            roots[vertex] = vertex = roots[roots[vertex]]
        return vertex

    for start, end in edges:
        a, b = sorted((root(start), root(end)))
        roots[b] = a
    found: dict[int, tuple[list[int], list[int]]] = {}
    for vertex in range(count):
        found.setdefault(root(vertex), ([], []))[0].append(vertex)
    for number, (start, _) in enumerate(edges):
        found[root(start)][1].append(number)
    return list(found.values())


def _drawn(
    sizes: Sequence[tuple[float, float]], edges: Sequence[Link], first: set[int], last: set[int], ordering: Ordering
) -> Drawing:
    """A connected part."""
    proper = _proper(len(sizes), edges, first, last)
    proper.ranks = ordering(proper.ranks, proper.links)
    widths = [width for width, _ in sizes] + [0.0] * sum(map(len, proper.chains))
    xs = _coordinates(proper, widths)
    left = min(x - width / 2 for x, width in zip(xs, widths, strict=True)) - MARGIN
    right = max(x + width / 2 for x, width in zip(xs, widths, strict=True)) + MARGIN
    ys = [0.0] * len(widths)
    top = MARGIN
    for rank in proper.ranks:
        height = max((sizes[v][1] for v in rank if v < len(sizes)), default=0.0)
        for vertex in rank:
            ys[vertex] = top + height / 2
        top += height + GAP_Y
    points = [(x - left, y) for x, y in zip(xs, ys, strict=True)]
    bends = [tuple(c for vertex in chain for c in points[vertex]) for chain in proper.chains]
    return Drawing(right - left, top - GAP_Y + MARGIN, points[: len(sizes)], bends)


def _proper(count: int, edges: Sequence[Link], first: Collection[int], last: Collection[int]) -> _Proper:
    """Ranks by the longest path to a box, sources moved down to their first reader; long edges cut into links."""
    forward = set(_acyclic(count, edges))
    after: dict[int, list[int]] = defaultdict(list)
    waiting = [0] * count
    for start, end in forward:
        after[start].append(end)
        waiting[end] += 1
    is_source = [not number for number in waiting]
    rank = [0] * count
    pending = [vertex for vertex in range(count) if is_source[vertex]]
    for vertex in pending:
        for end in after[vertex]:
            rank[end] = max(rank[end], rank[vertex] + 1)
            waiting[end] -= 1
            if not waiting[end]:
                pending.append(end)
    for vertex in range(count):
        if is_source[vertex] and after[vertex] and vertex not in first:
            rank[vertex] = min(rank[end] for end in after[vertex]) - 1
    bottom = max(rank)
    for vertex in last:
        rank[vertex] = bottom
    found = _Proper([[] for _ in range(1 + max(rank))])
    for vertex in range(count):
        found.ranks[rank[vertex]].append(vertex)
    total = count
    for start, end in edges:
        chain: list[int] = []
        span = rank[end] - rank[start]
        if (start, end) in forward and span <= LONGEST:
            for level in range(rank[start] + 1, rank[end]):
                chain.append(total)
                found.ranks[level].append(total)
                total += 1
            path = [start, *chain, end]
            found.links += pairwise(path)
        found.chains.append(chain)
    return found


def _acyclic(count: int, edges: Sequence[Link]) -> Iterator[Link]:
    """The edges without those that lead back to a vertex from which they are reached."""
    after: dict[int, list[int]] = defaultdict(list)
    for start, end in edges:
        after[start].append(end)
    state = [0] * count  # 1: on the path, 2: done
    for first in range(count):
        if state[first]:
            continue
        state[first] = 1
        path = [(first, iter(after[first]))]
        while path:
            vertex, ends = path[-1]
            for end in ends:
                if state[end] != 1:
                    yield vertex, end
                if not state[end]:
                    state[end] = 1
                    path.append((end, iter(after[end])))
                    break
            else:
                state[vertex] = 2
                path.pop()


def best_ordering() -> Ordering:
    """fast-sugiyama's, if it is installed."""
    try:
        import fast_sugiyama  # noqa: F401
    except ImportError:
        return by_barycentres
    return by_sugiyama


def by_sugiyama(ranks: Ranks, links: Sequence[Link]) -> Ranks:
    """The order that fast-sugiyama gives; as links go from rank to rank, its ranks are these."""
    from fast_sugiyama import from_edges

    if not links:
        return ranks
    level = {vertex: number for number, rank in enumerate(ranks) for vertex in rank}
    linked = {vertex for link in links for vertex in link}
    found: Ranks = [[] for _ in ranks]
    parts = [
        sorted((x, vertex) for vertex, (x, _) in positions)
        for positions, *_ in from_edges(list(links), ranking_type="minimize", dummy_vertices=False, check_layout=False)
    ]
    for part in sorted(parts, key=lambda part: min(vertex for _, vertex in part)):
        for _, vertex in part:
            found[level[vertex]].append(vertex)
    for number, rank in enumerate(ranks):
        found[number] += [vertex for vertex in rank if vertex not in linked]
    return found


def by_barycentres(ranks: Ranks, links: Sequence[Link]) -> Ranks:
    """Sweeps down and up, each rank in the order of the means of its neighbours' places."""
    above, below = _neighbours(links)
    ranks = [list(rank) for rank in ranks]
    place = {vertex: float(number) for rank in ranks for number, vertex in enumerate(rank)}
    for sweep in range(SWEEPS):
        near = below if sweep % 2 else above
        for rank in reversed(ranks) if sweep % 2 else ranks:
            means = {v: sum(place[n] for n in near[v]) / len(near[v]) if near[v] else place[v] for v in rank}
            rank.sort(key=means.__getitem__)
            place.update((vertex, float(number)) for number, vertex in enumerate(rank))
    return ranks


def _neighbours(links: Sequence[Link]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    above: dict[int, list[int]] = defaultdict(list)
    below: dict[int, list[int]] = defaultdict(list)
    for start, end in links:
        above[end].append(start)
        below[start].append(end)
    return above, below


def _coordinates(proper: _Proper, widths: Sequence[float]) -> list[float]:
    """Each vertex as near to the median of its neighbours as the order and the boxes' widths allow."""
    above, below = _neighbours(proper.links)
    xs = [0.0] * len(widths)
    for rank in proper.ranks:
        _spread(rank, [0.0] * len(rank), widths, xs)
    for sweep in range(STRAIGHTEN):
        near = below if sweep % 2 else above
        for rank in reversed(proper.ranks) if sweep % 2 else proper.ranks:
            _spread(rank, [_median([xs[n] for n in near[v]], xs[v]) for v in rank], widths, xs)
    return xs


def _median(values: list[float], otherwise: float) -> float:
    if not values:
        return otherwise
    values.sort()
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def _spread(rank: Sequence[int], wanted: Sequence[float], widths: Sequence[float], xs: list[float]) -> None:
    """Puts a rank as near to where it is wanted as the distances between neighbours allow, by least squares.

    With the distances taken off, what is left is to make numbers ascend: neighbours that do not are pooled to their mean.
    """
    offsets = [0.0]
    for left, right in pairwise(rank):
        offsets.append(offsets[-1] + (widths[left] + widths[right]) / 2 + GAP_X)
    pools: list[tuple[float, int]] = []  # mean, how many
    for target, offset in zip(wanted, offsets, strict=True):
        mean, count = target - offset, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    for vertex, mean, offset in zip(rank, means, offsets, strict=True):
        xs[vertex] = mean + offset
