"""The matching engine by itself: patterns made up for the purpose, on graphs of a few nodes."""

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from fuser import matching, patterns
from fuser.canonicalize import canonicalize
from fuser.fused import FusedOp, Signature, Source
from fuser.graph import Graph, Value
from fuser.importer import from_proto, load
from fuser.matching import CHECK, ESCAPE, STEP_BUDGET, STRUCTURE, Failure, Matcher, operator_counts
from fuser.pattern import Match, applies, capture, either, maybe, op, optional, require
from fuser.rewriting import Outcome, rewrite
from fuser.shapes import infer
from tests import text_graphs, zoo


def operator(function: Callable[..., Any], signature: str = "x[*B] -> y[*B]") -> FusedOp:
    """An operator with one source; what it computes does not matter here."""
    made = FusedOp("made_up", Signature.parse(signature), lambda *inputs: inputs)
    made.source(function)
    return made


def source(function: Callable[..., Any], signature: str = "x[*B] -> y[*B]") -> Source:
    return operator(function, signature).sources[0]


def graph(body: str, inputs: str = "float[4, 8] x", outputs: str = "float[4, 8] y", constants: str = "") -> Graph:
    """A graph as written: not canonicalized, so that each test sees the nodes it names."""
    declared = f"<{constants}>" if constants else ""
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {declared} {{ {body} }}'
    made = text_graphs.parse(text)
    found = from_proto(made, Path())
    infer(found)
    return found


def matches(found: Graph, wanted: Source) -> list[Match]:
    matcher = Matcher(found, wanted, operator_counts(found))
    return [match for anchor in matcher.candidates() if (match := matcher.match(anchor)) is not None]


def failure(found: Graph, wanted: Source) -> Failure:
    matcher = Matcher(found, wanted, operator_counts(found))
    assert all(matcher.match(anchor) is None for anchor in matcher.candidates())
    (only,) = matcher.failures.values()
    return only


def name(value: Value | None) -> str | None:
    return None if value is None else value.name


def test_an_alternative_that_fails_later_is_taken_back() -> None:
    wanted = source(lambda x: op.Exp(maybe(op.Abs(x))) - op.Tanh(x))
    (match,) = matches(graph("a = Abs(x)  b = Exp(a)  c = Tanh(x)  y = Sub(b, c)"), wanted)
    assert name(match.x) == "x"
    assert len(match.region) == 4
    # Here Abs stands in front as well, but Tanh reads its result: x is that result, and Abs no part of the match.
    (match,) = matches(graph("a = Abs(x)  b = Exp(a)  c = Tanh(a)  y = Sub(b, c)"), wanted)
    assert name(match.x) == "a"
    assert len(match.region) == 3


def test_alternatives_inside_alternatives() -> None:
    wanted = source(lambda x: op.Exp(either(op.Abs(maybe(op.Neg(x))), op.Tanh(maybe(op.Neg(x))))) * x)
    for inner, outer in itertools.product(("x", "n"), ("Abs", "Tanh")):
        found = graph(f"n = Neg(x)  a = {outer}({inner})  b = Exp(a)  y = Mul(x, b)")
        (match,) = matches(found, wanted)
        assert name(match.x) == "x"
        assert len(match.region) == (3 if inner == "x" else 4)


def test_maybe_is_the_node_or_its_input() -> None:
    wanted = source(lambda x: op.Exp(maybe(op.Abs(x))))
    assert len(matches(graph("a = Abs(x)  y = Exp(a)"), wanted)[0].region) == 2
    assert len(matches(graph("y = Exp(x)"), wanted)[0].region) == 1
    # A node that others read too is left outside.
    (match,) = matches(graph("a = Abs(x)  y = Exp(a)", outputs="float[4, 8] y, float[4, 8] a"), wanted)
    assert [node.op for node in match.region] == ["Exp"]


def test_maybe_needs_a_node() -> None:
    with pytest.raises(TypeError, match="a node with a first input"):
        source(lambda x: maybe(x))


@pytest.mark.parametrize("flips", list(itertools.product((False, True), repeat=3)))
def test_commutative_operators_match_in_any_order(flips: tuple[bool, ...]) -> None:
    wanted = source(lambda x, w: (op.Exp(x) + 0.5) * (op.Tanh(x) * w))
    first, second, third = (
        ", ".join(reversed(pair) if flip else pair)
        for pair, flip in zip((("a", "half"), ("b", "w"), ("c", "d")), flips, strict=True)
    )
    body = f"a = Exp(x)  b = Tanh(x)  c = Add({first})  d = Mul({second})  y = Mul({third})"
    (match,) = matches(graph(body, constants="float half = {0.5}, float[8] w"), wanted)
    assert name(match.w) == "w"


def test_other_operators_match_in_their_order() -> None:
    wanted = source(lambda x: op.Exp(x) - op.Tanh(x))
    assert matches(graph("a = Exp(x)  b = Tanh(x)  y = Sub(a, b)"), wanted)
    assert not matches(graph("a = Exp(x)  b = Tanh(x)  y = Sub(b, a)"), wanted)


def test_what_is_written_once_is_one_node() -> None:
    def shared(x: Any) -> Any:
        a = op.Exp(x)
        return op.Tanh(a) * op.Neg(a)

    assert matches(graph("a = Exp(x)  b = Tanh(a)  c = Neg(a)  y = Mul(b, c)"), source(shared))
    two = graph("a = Exp(x)  e = Exp(x)  b = Tanh(a)  c = Neg(e)  y = Mul(b, c)")
    assert not matches(two, source(shared))


def test_a_node_stands_for_one_node_of_the_pattern() -> None:
    wanted = source(lambda x: op.Tanh(op.Exp(x)) * op.Neg(op.Exp(x)))
    assert not matches(graph("a = Exp(x)  b = Tanh(a)  c = Neg(a)  y = Mul(b, c)"), wanted)
    assert matches(graph("a = Exp(x)  e = Exp(x)  b = Tanh(a)  c = Neg(e)  y = Mul(b, c)"), wanted)


def test_a_variable_is_one_value() -> None:
    wanted = source(lambda x, z: op.Exp(x) * x + z)
    inputs = "float[4, 8] x, float[4, 8] z"
    assert matches(graph("a = Exp(x)  b = Mul(a, x)  y = Add(b, z)", inputs), wanted)
    assert matches(graph("a = Exp(x)  b = Mul(a, x)  y = Add(b, x)"), wanted)  # two variables may be one value
    assert not matches(graph("a = Exp(x)  b = Mul(a, z)  y = Add(b, z)", inputs), wanted)


def test_equal_small_constants_are_one_value() -> None:
    wanted = source(lambda x, c: op.Exp(x * c) + c)
    body = "a = Mul(x, c)  b = Exp(a)  y = Add(b, d)"
    assert matches(graph(body, constants="float c = {2}, float d = {2}"), wanted)
    assert not matches(graph(body, constants="float c = {2}, float d = {3}"), wanted)


def test_outputs_are_found_by_climbing() -> None:
    def three(x: Any, w: Any) -> Any:
        total = x + w
        return op.Tanh(op.Neg(total)), total, op.Exp(total)

    body = "total = Add(w, x)  n = Neg(total)  a = Tanh(n)  b = Exp(total)  c = Abs(total)  y = Sub(c, b)"
    found = graph(body, outputs="float[4, 8] y, float[4, 8] a", constants="float[8] w")
    (match,) = matches(found, source(three, "x[*B, D], w[D] -> a[*B, D], total[*B, D], b[*B, D]"))
    assert [name(value) for value in match.outputs] == ["a", "total", "b"]
    assert name(match.w) == "w"


def test_outputs_of_equal_form_are_different_nodes() -> None:
    def two(x: Any, v: Any, w: Any) -> Any:
        return x @ v, x @ w

    found = graph(
        "y = MatMul(x, v)  z = MatMul(x, w)",
        outputs="float[4, 5] y, float[4, 6] z",
        constants="float[8, 5] v, float[8, 6] w",
    )
    wanted = source(two, "x[*B, D], v[D, N], w[D, M] -> y[*B, N], z[*B, M]")
    assert all(match.outputs[0] is not match.outputs[1] for match in matches(found, wanted))
    assert {name(match.outputs[0]) for match in matches(found, wanted)} == {"y", "z"}


def test_outputs_of_one_node() -> None:
    wanted = source(lambda x: op.Split(op.Exp(x), axis=-1, outputs=2), "x[*B, D] -> *y[*B, N]")
    wanted.operator._shapes = lambda bound, inputs: []
    body = "a = Exp(x)  {} = Split<axis = -1, num_outputs = {}>(a)"
    two = graph(body.format("b, c", 2), outputs="float[4, 4] b, float[4, 4] c")
    assert [name(value) for value in matches(two, wanted)[0].outputs] == ["b", "c"]
    four = graph(body.format("b, c, d, e", 4), outputs="float[4, 2] b, float[4, 2] e")
    assert not matches(four, wanted)


def test_optional_inputs() -> None:
    wanted = source(lambda x, w, b: op.LayerNormalization(x, w, optional(b)), "x[*B, D], w[D], b[D]? -> y[*B, D]")
    (match,) = matches(graph("y = LayerNormalization(x, w, b)", constants="float[8] w, float[8] b"), wanted)
    assert name(match.b) == "b"
    (match,) = matches(graph("y = LayerNormalization(x, w)", constants="float[8] w"), wanted)
    assert match.b is None
    strict = source(lambda x, w: op.LayerNormalization(x, w), "x[*B, D], w[D] -> y[*B, D]")
    assert not matches(graph("y = LayerNormalization(x, w, b)", constants="float[8] w, float[8] b"), strict)


def test_attributes_have_their_defaults() -> None:
    wanted = source(lambda x: op.Softmax(x, axis=-1))
    assert matches(graph("y = Softmax(x)"), wanted)
    assert matches(graph("y = Softmax<axis = -1>(x)"), wanted)
    assert not matches(graph("y = Softmax<axis = 0>(x)"), wanted)
    kept = source(lambda x: op.Elu(x, alpha=capture("slope")))
    assert matches(graph("y = Elu(x)"), kept)[0].attributes == {"slope": 1.0}
    assert matches(graph("y = Elu<alpha = 0.25>(x)"), kept)[0].attributes == {"slope": 0.25}


def test_numbers_match_as_far_as_their_type_can_say() -> None:
    def holds(number: str, kind: str = "float") -> bool:
        body = "a = Exp(x)  y = Mul(a, c)"
        found = graph(body, f"{kind}[4, 8] x", f"{kind}[4, 8] y", f"{kind} c = {{{number}}}")
        return bool(matches(found, source(lambda x: op.Exp(x) * 0.7978845608)))

    assert holds("0.7978845834732056")
    assert not holds("0.798")
    assert holds("14946", "float16")  # the bits of 0.798, the nearest there is
    assert not holds("14848", "float16")  # of 0.75


def test_an_interior_value_must_not_escape() -> None:
    wanted = source(lambda x: op.Tanh(op.Exp(x)))
    found = failure(graph("a = Exp(x)  y = Tanh(a)  z = Neg(a)", outputs="float[4, 8] y, float[4, 8] z"), wanted)
    assert found.rank == ESCAPE
    assert found.expected == "a to be read only inside the match"
    assert found.found == "it is read by Neg(Exp) at z"
    found = failure(graph("a = Exp(x)  y = Tanh(a)", outputs="float[4, 8] y, float[4, 8] a"), wanted)
    assert found.found == "it is read by the graph's outputs"


def test_a_region_must_be_convex() -> None:
    def shared(x: Any, z: Any) -> Any:
        a = op.Exp(x)
        return a, op.Tanh(a + z)

    wanted = source(shared, "x[*B], z[*B] -> a[*B], b[*B]")
    inputs, outputs = "float[4, 8] x, float[4, 8] z", "float[4, 8] a, float[4, 8] y"
    assert matches(graph("a = Exp(x)  s = Add(a, z)  y = Tanh(s)", inputs, outputs), wanted)
    # What is added comes from the first output, by nodes outside: fused, it would wait for itself.
    around = graph("a = Exp(x)  n = Neg(a)  z = Abs(n)  s = Add(a, z)  y = Tanh(s)", outputs=outputs)
    assert failure(around, wanted).expected == "no path may lead out of the match and back in"


def test_a_refused_match_goes_on_to_the_next() -> None:
    made = operator(lambda x, w: maybe(op.Exp(x)) * w)

    @made.sources[0].attributes
    def _(m: Match) -> dict[str, Any]:
        require(m.x.name == "a", "x must be a", m.x)
        return {}

    found = graph("a = Abs(x)  b = Exp(a)  c = Exp(b)  y = Mul(b, c)", constants="float[8] w")
    assert not matches(found, made.sources[0])
    assert failure(found, made.sources[0]).rank == CHECK
    found = graph("a = Abs(x)  y = Mul(a, w)", constants="float[8] w")
    assert name(matches(found, made.sources[0])[0].x) == "a"


def test_what_does_not_apply_is_no_failure() -> None:
    made = operator(lambda x: op.Tanh(op.Exp(x)))
    made.sources[0].attributes(lambda m: applies(False) or {})
    matcher = Matcher(found := graph("a = Exp(x)  y = Tanh(a)"), made.sources[0], operator_counts(found))
    assert [matcher.match(anchor) for anchor in matcher.candidates()] == [None]
    assert matcher.failures == {}


def test_the_type_of_the_result_is_part_of_the_match() -> None:
    """A Cast that the fused node could not give stays outside."""
    wanted = source(lambda x: maybe(op.Cast(op.Tanh(maybe(op.Cast(x))))))
    body = "a = Cast<to = 1>(x)  b = Tanh(a)  y = Cast<to = 10>(b)"
    (match,) = matches(graph(body, "float16[4, 8] x", "float16[4, 8] y"), wanted)
    assert len(match.region) == 3
    (match,) = matches(graph("b = Tanh(x)  y = Cast<to = 10>(b)", outputs="float16[4, 8] y"), wanted)
    assert [node.op for node in match.region] == ["Tanh"]


def _adversary(depth: int) -> tuple[Graph, Source]:
    """A tree of sums whose first leaf is not what the others are, and the tree of a pattern in which it must be.

    Every order of every sum leads there: 2 to the power of the number of sums.
    """
    number = itertools.count()
    nodes = []

    def add(level: int, last: str) -> str:
        if level == 0:
            return last
        a, b = add(level - 1, last), add(level - 1, "x")
        nodes.append(f"s{(i := next(number))} = Add({a}, {b})")
        return f"s{i}"

    nodes.append(f"y = Exp({add(depth, 'z')})")

    def tree(level: int, leaf: Any) -> Any:
        return leaf if level == 0 else tree(level - 1, leaf) + tree(level - 1, leaf)

    found = graph("  ".join(nodes), "float[4, 8] x, float[4, 8] z")
    return found, source(lambda x: op.Exp(tree(depth, x)))


def test_the_step_budget_ends_an_adversarial_graph() -> None:
    found, wanted = _adversary(6)
    start = time.perf_counter()
    only = failure(found, wanted)
    assert time.perf_counter() - start < 5
    assert only.expected == "a match or its end within the step budget"
    assert only.found == f"neither in {STEP_BUDGET} steps"
    outcome = rewrite(found, [wanted.operator])
    assert [(miss.expected, miss.found) for miss in outcome.misses] == [(only.expected, only.found)]


def test_real_models_need_a_small_part_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    search = Matcher._search

    def counted(self: Matcher, *args: Any, **options: Any) -> Match | None:
        try:
            return search(self, *args, **options)
        finally:
            steps.append(self._steps)

    monkeypatch.setattr(Matcher, "_search", counted)
    for architecture in ("llama", "gpt2", "bert"):
        rewrite(_canonical(zoo.exported(architecture, "torchscript")), patterns.ALL)
    assert 0 < max(steps) < STEP_BUDGET / 10


def _canonical(path: Path) -> Graph:
    found = load(path)
    canonicalize(found)
    return found


@pytest.mark.parametrize(
    ("architecture", "exporter"), [("llama", "dynamo"), ("gpt2", "optimum"), ("bert", "torchscript")]
)
def test_the_order_of_nodes_does_not_matter(architecture: str, exporter: str) -> None:
    model = onnx.load(zoo.exported(architecture, exporter))
    expected = rewrite(text_graphs.canonical(model), patterns.ALL)
    for seed in range(3):
        outcome = rewrite(text_graphs.canonical(_shuffled(model, seed)), patterns.ALL)
        assert outcome.fused == expected.fused
        assert outcome.misses == expected.misses == []


def _shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The nodes in another order in which each comes after what it reads."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    makers = {output: i for i, node in enumerate(model.graph.node) for output in node.output}
    waiting = {i: {makers[name] for name in node.input if name in makers} for i, node in enumerate(model.graph.node)}
    chosen, order = random.Random(seed), []
    ready = [i for i, needs in waiting.items() if not needs]
    readers: dict[int, list[int]] = {}
    for i, needs in waiting.items():
        for need in needs:
            readers.setdefault(need, []).append(i)
    while ready:
        i = ready.pop(chosen.randrange(len(ready)))
        order.append(i)
        for reader in readers.get(i, ()):
            waiting[reader].discard(i)
            if not waiting[reader]:
                ready.append(reader)
    assert sorted(order) == list(range(len(order))) != order
    del copy.graph.node[:]
    copy.graph.node.extend(model.graph.node[i] for i in order)
    return copy


def test_failures_are_ranked() -> None:
    def made(rank: int, matched: int, total: int = 10) -> Failure:
        return Failure(rank, matched, total, "", "", "", None)

    order = [made(CHECK, 1, 1), made(ESCAPE, 10), made(STRUCTURE, 9), made(STRUCTURE, 8), made(STRUCTURE, 3, 4)]
    assert sorted(order, key=lambda f: f.closeness, reverse=True) == order
    assert (CHECK, ESCAPE, STRUCTURE) == (0, 1, 2)


ROOT = "{0}a = Mul({1}, {1})  {0}b = ReduceMean{2}({0}a, last)  {0}c = Add({0}b, eps)  {0}d = Sqrt({0}c)  {0}e = Div({1}, {0}d)"


def test_near_misses_come_nearest_first() -> None:
    """A wrong axis, an escaping value and a wrong weight: each place is reported once, the last one first."""
    model = text_graphs.parse(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[7, 8, 8] x, float[7, 8, 8] z, float[7, 8, 8] u)
          => (float[7, 8, 8] xy, float[7, 8, 8] zy, float[7, 8, 1] zb, float[7, 8, 8] uy)
        <float eps = {{1e-5}}, int64[1] last = {{-1}}, float[8] w, float[8, 8] full>
        {{ {ROOT.format("x", "x", "<keepdims = 0>")}  xy = Mul(xe, w)
           {ROOT.format("z", "z", "")}  zy = Mul(ze, w)
           {ROOT.format("u", "u", "")}  uy = Mul(ue, full) }}""")
    outcome = rewrite(text_graphs.canonical(model), patterns.ALL)
    assert outcome.fused == {}
    assert [(miss.rank, miss.node) for miss in outcome.misses] == [(CHECK, "uy"), (ESCAPE, "zb"), (STRUCTURE, "xb")]
    check, escape, structure = outcome.misses
    assert check.expected == "rms_norm: weight must be [D] with D=8, got [8, 8]"
    assert escape.expected == "zb to be read only inside the match"
    assert structure.expected == "ReduceMean with keepdims=1"
    assert all(miss.fusion == "rms_norm" and miss.count == 1 for miss in outcome.misses)


def test_equal_near_misses_are_one() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[8, 8] x, float[8, 8] z) => (float[8, 8] xy, float[8, 8] zy)
        <float eps = {{1e-5}}, int64[1] last = {{-1}}, float[8] w>
        {{ {0}  xy = Mul(xe, w)  {1}  zy = Mul(ze, w) }}"""
    model = text_graphs.parse(text.format(*(ROOT.format(n, n, "<keepdims = 0>") for n in "xz")))
    (miss,) = rewrite(text_graphs.canonical(model), patterns.ALL).misses
    assert miss.count == 2


def test_a_place_that_fuses_otherwise_is_no_near_miss() -> None:
    """A LayerNorm contains an RMSNorm, and the first form tried of each is often not the one that matches."""
    for case in (Path(__file__).parent / "cases").glob("*/*.txt"):
        if case.stem in ("pow_sqrt_div", "reciprocal", "factored", "power", "exponential", "decomposed"):
            text = case.read_text().partition("---\n")[0].partition("\n")[2]
            outcome: Outcome = rewrite(text_graphs.graph(text), patterns.ALL)
            assert outcome.misses == [], case


def test_wrong_numbers_are_named() -> None:
    wanted = source(lambda x: op.Exp(x * 2) + op.Tanh(op.Neg(x) * 3) * 4)
    body = "a = Mul(x, c)  b = Exp(a)  n = Neg(x)  d = Mul(n, e)  f = Tanh(d)  h = Mul(f, i)  y = Add(b, h)"

    def closest(c: int, e: int, i: int) -> Failure:
        return failure(graph(body, constants=f"float c = {{{c}}}, float e = {{{e}}}, float i = {{{i}}}"), wanted)

    one = closest(2, 3, 5)
    assert (one.matched, one.total, one.expected, one.found) == (6, 7, "constant 4", "constant 5 (i)")
    assert one.place is not None and one.place.output.name == "h"
    two = closest(2, 4, 5)
    assert (two.expected, two.found) in (
        ("constant 3", "constant 4 (e)"),
        ("constant 4", "constant 5 (i)"),
    )


def test_a_failure_names_the_line_of_the_pattern() -> None:
    found = failure(graph("a = Exp(x)  y = Tanh(a)", outputs="float[4, 8] y, float[4, 8] a"), source(_on_its_own_line))
    assert found.line == f"tests/test_matching.py:{_on_its_own_line.__code__.co_firstlineno + 1}"


def _on_its_own_line(x: Any) -> Any:
    return op.Tanh(op.Exp(x))


def test_described_values() -> None:
    found = graph("a = Mul(x, c)  y = Mul(a, w)", constants="float c = {2}, float[8] w")
    first, second = found.nodes
    assert matching.describe(None) == "no input"
    assert matching.describe(found.inputs[0]) == "input x"
    assert matching.describe(first.inputs[1]) == "constant 2 (c)"
    assert matching.describe(second.inputs[1]) == "constant w[8]"
    assert matching.describe(first.output) == "Mul(x, c) at a"
