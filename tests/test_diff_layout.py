"""Layered drawings: boxes do not overlap, edges go down, with fast-sugiyama and without."""

import random
import sys
from itertools import combinations

import pytest

from fuser.diff.layout import (
    GAP_X,
    GAP_Y,
    LONGEST,
    Drawing,
    Ordering,
    best_ordering,
    by_barycentres,
    by_sugiyama,
    drawing,
)

ORDERINGS = {"fast-sugiyama": by_sugiyama, "barycentres": by_barycentres}
Graph = tuple[list[tuple[float, float]], list[tuple[int, int]]]


@pytest.fixture(params=ORDERINGS)
def ordering(request: pytest.FixtureRequest) -> Ordering:
    if request.param == "fast-sugiyama":
        pytest.importorskip("fast_sugiyama")
    return ORDERINGS[request.param]


def acyclic(seed: int, count: int, links: int) -> Graph:
    """A random graph whose edges lead to later boxes, mostly near ones, as layers of a model do."""
    draw = random.Random(seed)
    sizes = [(float(draw.randint(40, 200)), draw.choice([20.0, 20.0, 20.0, 300.0])) for _ in range(count)]
    edges = {
        (a, min(count - 1, a + draw.randint(1, draw.choice([3, 3, 12])))) for a in draw.choices(range(count), k=links)
    }
    return sizes, sorted((a, b) for a, b in edges if a != b)


def overlaps(sizes: list[tuple[float, float]], made: Drawing) -> list[tuple[int, int]]:
    def apart(a: int, b: int) -> bool:
        (ax, ay), (bx, by) = made.centres[a], made.centres[b]
        wide, high = (sizes[a][0] + sizes[b][0]) / 2, (sizes[a][1] + sizes[b][1]) / 2
        return abs(ax - bx) >= wide + GAP_X - 0.2 or abs(ay - by) >= high + GAP_X - 0.2

    return [(a, b) for a, b in combinations(range(len(sizes)), 2) if not apart(a, b)]


@pytest.mark.parametrize("seed", range(6))
def test_boxes_do_not_overlap_and_edges_go_down(seed: int, ordering: Ordering) -> None:
    sizes, edges = acyclic(seed, 90, [60, 100, 160, 250, 40, 120][seed])
    made = drawing(sizes, edges, ordering=ordering)
    assert overlaps(sizes, made) == []
    for (start, end), bends in zip(edges, made.bends, strict=True):
        heights = [made.centres[start][1], *bends[1::2], made.centres[end][1]]
        assert heights == sorted(heights)
        assert heights[-1] - heights[0] >= (sizes[start][1] + sizes[end][1]) / 2 + GAP_Y - 0.2
    for (x, y), (width, height) in zip(made.centres, sizes, strict=True):
        assert width / 2 <= x <= made.width - width / 2 and height / 2 <= y <= made.height - height / 2


def test_points_of_an_edge_stand_beside_boxes(ordering: Ordering) -> None:
    """A chain and an edge past it: the edge is led through each rank, and through no box."""
    sizes, edges = [(100.0, 20.0)] * 6, [*((n, n + 1) for n in range(5)), (0, 5)]
    made = drawing(sizes, edges, ordering=ordering)
    xs = made.bends[-1][::2]
    assert len(xs) == 4
    assert all(abs(x - made.centres[1 + n][0]) >= 50 + GAP_X - 0.2 for n, x in enumerate(xs))
    columns = {made.centres[n][0] for n in range(1, 5)}
    assert len(columns) == 1 and len(set(xs)) == 1  # both straight


def test_what_comes_in_is_at_the_top_and_what_leaves_at_the_bottom(ordering: Ordering) -> None:
    sizes, edges = [(60.0, 20.0)] * 4 + [(0.0, 0.0)] * 2, [(0, 1), (1, 2), (4, 2), (0, 5), (2, 3)]
    made = drawing(sizes, edges, first=[4], last=[5], ordering=ordering)
    assert made.centres[4][1] == made.centres[0][1]
    assert made.centres[5][1] == made.centres[3][1]


@pytest.mark.parametrize(
    "edges", [[(0, 1), (1, 2), (2, 0)], [(0, 1), (1, 0), (1, 2)], [(n, (n + 1) % 3) for n in range(3)]]
)
def test_circles_are_drawn(edges: list[tuple[int, int]], ordering: Ordering) -> None:
    made = drawing([(50.0, 20.0)] * 3, edges, ordering=ordering)
    assert len(made.bends) == len(edges) and overlaps([(50.0, 20.0)] * 3, made) == []


def test_nothing_and_one_box(ordering: Ordering) -> None:
    assert drawing([], [], ordering=ordering).centres == []
    made = drawing([(50.0, 20.0)], [], ordering=ordering)
    assert made.width >= 50 and made.height >= 20


def test_the_longest_edges_are_straight(ordering: Ordering) -> None:
    count = LONGEST + 10
    edges = [*((n, n + 1) for n in range(count - 1)), (0, count - 1), (0, LONGEST)]
    made = drawing([(50.0, 20.0)] * count, edges, ordering=ordering)
    assert made.bends[-2] == () and len(made.bends[-1]) == 2 * (LONGEST - 1)


def test_the_same_again(ordering: Ordering) -> None:
    sizes, edges = acyclic(3, 200, 300)
    assert drawing(sizes, edges, ordering=ordering) == drawing(sizes, edges, ordering=ordering)


def test_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_sugiyama", None)  # as if it were not installed
    assert best_ordering() is by_barycentres
    sizes, edges = acyclic(1, 30, 40)
    assert overlaps(sizes, drawing(sizes, edges)) == []


def test_fewer_crossings_than_in_the_order_of_the_graph(ordering: Ordering) -> None:
    """Two ranks linked crosswise: an order without crossings is found."""
    count = 8
    edges = [(n, count + (count - 1 - n)) for n in range(count)] + [
        (n, count + count - 2 - n) for n in range(count - 1)
    ]
    made = drawing([(40.0, 20.0)] * 2 * count, edges, ordering=ordering)
    spans = [(made.centres[a][0], made.centres[b][0]) for a, b in edges]
    crossings = sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(spans, 2))
    assert crossings == 0
