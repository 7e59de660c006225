"""The executor: every model of the zoo as torch runs it, what it refuses, what it keeps and what it lets go."""

import gc
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fuser import dims, patterns
from fuser.canonicalize import canonicalize
from fuser.constants import Array, Joined, Transposed
from fuser.dtypes import DType
from fuser.errors import FuserError, InputError, UnsupportedOperator
from fuser.fused import REGISTRY
from fuser.graph import FUSER, Graph, Value
from fuser.importer import from_proto, load
from fuser.rewriting import rewrite
from fuser.runtime import executor
from fuser.runtime.executor import Executor
from fuser.runtime.sizes import expression
from fuser.tensors import Held, to_array
from tests import models, zoo

TOLERANCE = 2e-5
DEMANDED = ("llama", "qwen2", "gpt2")
EXPORTS = [
    pytest.param(a, e, marks=() if a in DEMANDED or not e.startswith("dynamo") else pytest.mark.slow)
    for a, e in zoo.EXPORTS + zoo.MORE_EXPORTS
    if a != "falcon_alibi"  # which TorchScript writes with complex numbers, and nothing runs
]


@cache
def _graphs(path: Path) -> dict[str, Graph]:
    """A file as it was imported, canonical, and fused."""
    imported, canonical = load(path), load(path)
    canonicalize(canonical)
    fused = canonical.clone()
    rewrite(fused, patterns.ALL, verify=False)
    return {"imported": imported, "canonical": canonical, "fused": fused}


def _run(made: Executor, graph: Graph, feeds: Mapping[str, Any]) -> dict[str, Any]:
    outputs = made(*(torch.from_numpy(np.array(feeds[value.name])) for value in graph.inputs))
    return {name: to_array(tensor) for name, tensor in zip(graph.output_names, outputs, strict=True)}


@pytest.mark.parametrize("stage", ["imported", "canonical", "fused"])
@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_runs_the_zoo(architecture: str, exporter: str, stage: str) -> None:
    path = zoo.exported(architecture, exporter)
    graph = _graphs(path)[stage]
    made = Executor(graph)
    for name, feeds in zoo.cases(path).items():
        if name == "padded" and "prefill" in exporter:
            continue  # implementations differ in what queries get that may attend to nothing
        length = None
        if exporter == "transformers-static":  # a cache of a fixed size is compared as far as it is filled
            length = int(feeds["input_ids"].shape[1]) + next(
                int(array) for key, array in feeds.items() if key.endswith(".cumulative_length")
            )
        actual = zoo.standard(_run(made, graph, feeds), length=length)
        error = zoo.relative_error(actual, zoo.reference(architecture, feeds))
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("architecture", DEMANDED)
def test_runs_float16(architecture: str) -> None:
    path = zoo.exported(architecture, "torchscript", dtype="float16")
    for graph in _graphs(path).values():
        made = Executor(graph)
        for feeds in zoo.cases(path).values():
            actual = _run(made, graph, feeds)
            assert {array.dtype for array in actual.values()} == {np.dtype(np.float16)}
            assert zoo.relative_error(actual, zoo.reference(architecture, feeds)) <= 5e-3


def _llama(stage: str = "fused") -> tuple[Graph, dict[str, dict[str, Any]]]:
    path = zoo.exported("llama", "torchscript")
    return _graphs(path)[stage], zoo.cases(path)


def _tensors(graph: Graph, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    return {value.name: torch.from_numpy(np.array(feeds[value.name])) for value in graph.inputs}


REFUSED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda x: x | {"input_ids": x["input_ids"].int()}, "input 'input_ids' must be int64, got int32"),
    (lambda x: x | {"input_ids": x["input_ids"].tolist()}, "input 'input_ids' must be a torch tensor, got list"),
    (
        lambda x: x | {"input_ids": x["input_ids"][0]},
        r"input 'input_ids' must be \[batch, sequence\], got \[3\]",
    ),
    (
        lambda x: x | {"position_ids": x["position_ids"][:, :2]},
        r"input 'position_ids' must be \[batch, sequence\]: its axis 1 must be 3 as 'sequence' is in 'input_ids', got \[1, 2\]",
    ),
    (
        lambda x: x | {"past_key_values.1.value": x["past_key_values.1.value"][..., :3]},
        r"input 'past_key_values.1.value' must be .*: its axis 3 must be 16, got \[1, 2, 5, 3\]",
    ),
    (
        lambda x: x | {"input_ids": x["input_ids"] + 100000},
        r"Gather \(node '[^']+'\): .*out of (range|bounds)",
    ),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=range(len(REFUSED)))
def test_odd_inputs_are_refused(change: Callable[[dict[str, Any]], Any], text: str) -> None:
    graph, cases = _llama()
    made = Executor(graph)
    inputs = _tensors(graph, cases["chunk"])
    expected = made(*inputs.values())
    with pytest.raises(FuserError, match=text) as refusal:
        made(*change(inputs).values())
    assert "\n" not in str(refusal.value)
    for again, before in zip(made(*inputs.values()), expected, strict=True):  # and nothing is broken by it
        assert torch.equal(again, before)


def test_a_missing_input_is_refused() -> None:
    graph, cases = _llama()
    inputs = list(_tensors(graph, cases["chunk"]).values())
    with pytest.raises(InputError, match=r"7 inputs are wanted \('input_ids', .*\), 6 were given"):
        Executor(graph)(*inputs[:-1])


def test_sizes_of_computed_dims_are_checked() -> None:
    past, new = dims.symbol("past"), dims.symbol("new")
    graph = Graph("computed", 20)
    graph.inputs = [
        Value("mask", DType.FLOAT32, (past + new,)),
        Value("x", DType.FLOAT32, (new,)),
        Value("before", DType.FLOAT32, (past,)),
    ]
    graph.define(new, graph.inputs[1], 0)
    graph.define(past, graph.inputs[2], 0)
    both = graph.add("Concat", [graph.inputs[2], graph.inputs[1]], {"axis": -1}).output
    graph.outputs, graph.output_names = [graph.add("Mul", [both, graph.inputs[0]]).output], ["y"]
    graph.outputs[0].is_output = True
    made = Executor(graph)
    (y,) = made(torch.tensor([1.0, 2.0, 3.0]), torch.ones(1), torch.ones(2))
    assert y.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(InputError, match=r"input 'mask' must be .*: its axis 0 must be 3 \(new \+ past\), got \[4\]"):
        made(torch.ones(4), torch.ones(1), torch.ones(2))


def _imported(text: str, weights: Mapping[str, Any] | None = None, more: str = "") -> Graph:
    return from_proto(models.one(text, weights, more=more), Path())


def test_unknown_operators_are_named_at_once() -> None:
    body = "(float[N] x) => (float[N] y) { a = strange.Twist(x) b = strange.Turn(a) y = Relu(b) }"
    with pytest.raises(UnsupportedOperator, match=r"computes strange.Twist \(node 'a'\), strange.Turn \(node 'b'\)"):
        Executor(_imported(body, more=', "strange": 1'))


def test_control_flow_is_declined() -> None:
    body = """(bool c, float[N] x) => (float[N] y) {
        y = If(c) <then_branch = g () => (float[N] a) { a = Relu(x) }, else_branch = h () => (float[N] b) { b = Neg(x) }>
    }"""
    with pytest.raises(UnsupportedOperator, match=r"If \(node 'y'\): control flow is not run"):
        Executor(_imported(body))


def test_weights_without_elements_are_refused() -> None:
    graph = Graph("meta", 20)
    x = Value("x", DType.FLOAT32, (2, 3))
    graph.inputs = [x]
    weight = graph.constant(Held(torch.empty(3, 3, device="meta"), "w"), "w")
    graph.outputs, graph.output_names = [graph.add("MatMul", [x, weight]).output], ["y"]
    graph.outputs[0].is_output = True
    with pytest.raises(InputError, match="no elements"):
        Executor(graph)


def test_weights_are_not_copied() -> None:
    """A module's weight is used where it lies, transposed as a view; parts that are joined are copied once for all readers."""
    held = [torch.randn(5, 4), torch.randn(3, 4), torch.randn(4)]
    graph = Graph("weights", 20)
    x = Value("x", DType.FLOAT32, (2, 4))
    graph.inputs = [x]
    parts = [Held(w, f"w{i}") for i, w in enumerate(held)]
    joined = Joined((Transposed(parts[0]), Transposed(parts[1])))
    made = [
        graph.add("MatMul", [x, graph.constant(w, "w")]).output
        for w in (joined, Joined(joined.parts), Transposed(parts[0]))
    ]
    made.append(graph.add("Mul", [x, graph.constant(parts[2], "g")]).output)
    graph.outputs, graph.output_names = made, list("abcd")
    for value in made:
        value.is_output = True
    run = Executor(graph)
    tensors = [item for item in run._program.names.values() if isinstance(item, Tensor)]
    pointers = [tensor.data_ptr() for tensor in tensors]
    assert held[0].data_ptr() in pointers and held[2].data_ptr() in pointers
    assert len(tensors) == 3  # the two joins are the same
    given = torch.randn(2, 4)
    both = given @ torch.cat([held[0].T, held[1].T], 1)
    for actual, expected in zip(run(given), (both, both, given @ held[0].T, given * held[2]), strict=True):
        torch.testing.assert_close(actual, expected)


def test_caches_are_bounded() -> None:
    graph, _ = _llama()
    path = zoo.exported("llama", "torchscript")
    made = Executor(graph)
    for past in range(2 * executor.CACHED):
        _run(made, graph, zoo.feeds(path, 1, 2, past))
    assert len(made._cache) == executor.CACHED


COUNTED = """(float[batch, sequence, 4] x, float[batch, past, 4] before) => (float[batch, sequence, total] y) {
    shape = Shape(before)
    one = Constant<value = int64[1] {1}>()
    past = Gather(shape, one)
    all = Concat<axis = 1>(before, x)
    keys = Shape<start = 1, end = 2>(all)
    zero = Constant<value = int64 {0}>()
    step = Constant<value = int64 {1}>()
    end = Squeeze(keys)
    start = Squeeze(past)
    j = Range(zero, end, step)
    i = Range(start, end, step)
    axis = Constant<value = int64[1] {1}>()
    rows = Unsqueeze(i, axis)
    allowed = LessOrEqual(j, rows)
    turned = Transpose<perm = [0, 2, 1]>(all)
    scores = MatMul(x, turned)
    lowest = Constant<value = float {-10.0}>()
    y = Where(allowed, scores, lowest)
}"""


@pytest.mark.parametrize("stage", ["imported", "canonical"])
def test_positions_are_computed_once_for_each_size(stage: str) -> None:
    """What depends on sizes alone is computed when they change, and not at a second step of the same sizes."""
    graph = _imported(COUNTED)
    if stage == "canonical":
        canonicalize(graph)
    made = Executor(graph)
    in_run = made.source[made.source.index("def run") :]
    assert "Range" in made.source and "Range" not in in_run and "le(" not in in_run

    calls = 0
    sized = made._program.names["sized"]

    def counted(*sizes: int) -> Any:
        nonlocal calls
        calls += 1
        return sized(*sizes)

    made._program.names["sized"] = counted
    feeds = [(torch.randn(2, s, 4), torch.randn(2, p, 4)) for s, p in ((3, 5), (3, 5), (1, 8), (3, 5), (2, 0), (2, 0))]
    expected_calls = (1, 1, 2, 2, 3, 3)
    for (x, before), count in zip(feeds, expected_calls, strict=True):
        (y,) = made(x, before)
        assert calls == count
        both = torch.cat([before, x], 1)
        i, j = torch.arange(before.shape[1], both.shape[1])[:, None], torch.arange(both.shape[1])
        torch.testing.assert_close(y, torch.where(j <= i, x @ both.mT, torch.tensor(-10.0)))


def test_kept_tensors_are_not_given_away() -> None:
    """An output that is kept for later steps, a constant's too, may be written to by whoever gets it."""
    graph = _imported(
        "(float[N, 2] x) => (int64[N] a, float[2] w, float[N, 2] y) { shape = Shape<start = 0, end = 1>(x) n = Squeeze(shape)"
        " zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>() a = Range(zero, n, one)"
        " v = Constant<value = float[2] {1.0, 2.0}>() w = Identity(v) y = Mul(x, v) }"
    )
    made = Executor(graph)
    x = torch.ones(3, 2)
    for tensor in made(x):
        tensor.zero_()
    a, w, y = made(x)
    assert a.tolist() == [0, 1, 2] and w.tolist() == [1.0, 2.0] and y.tolist() == [[1.0, 2.0]] * 3


def test_values_die_when_last_used() -> None:
    """When an operator runs, nothing is alive that neither it nor a later one reads."""
    graph, cases = _llama()
    readers = {id(value): len(value.uses) for node in graph.nodes for value in node.outputs}
    made_by: list[weakref.ref[Tensor]] = []
    most, made_in_all = 0, 0

    def watched(name: str) -> Callable[..., Any]:
        def kernel(*inputs: Any, **attributes: Any) -> Any:
            nonlocal most, made_in_all
            most = max(most, sum(ref() is not None for ref in made_by))
            result = REGISTRY[name].reference(*inputs, **attributes)
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                made_by.append(weakref.ref(tensor))
                made_in_all += 1
            return result

        return kernel

    fused = {node.op for node in graph.nodes if node.domain == FUSER and node.op in REGISTRY}
    run = Executor(graph, kernels={name: watched(name) for name in fused})
    outputs = run(*_tensors(graph, cases["chunk"]).values())
    # The caches of two layers, the residual, the tables before and after they are unsqueezed, the mask, queries.
    assert made_in_all > 25 and readers
    assert most <= 10, f"{most} of {made_in_all} alive"
    gc.collect()
    assert sum(ref() is not None for ref in made_by) <= len(outputs)


def test_kernels_take_the_place_of_references() -> None:
    graph, cases = _llama()
    calls: list[dict[str, Any]] = []

    def silent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **attributes: Any) -> Tensor:
        calls.append(attributes)
        return torch.zeros(q.shape[0], q.shape[2], q.shape[1] * v.shape[3])

    inputs = _tensors(graph, cases["chunk"]).values()
    ours, theirs = Executor(graph)(*inputs), Executor(graph, kernels={"attention": silent})(*inputs)
    assert len(calls) == 2 and calls[0]["merged"] is True
    assert not torch.allclose(ours[0], theirs[0])


def test_no_text_of_the_model_is_in_the_source() -> None:
    graph = _imported(
        "(float[evil_batch] evil_x) => (float[evil_batch] evil_y) { evil_z = Relu(evil_x) evil_y = Neg(evil_z) }"
    )
    made = Executor(graph)
    assert "evil" not in made.source and "def run(x0, sized)" in made.source
    (y,) = made(torch.tensor([1.0, -2.0]))
    assert y.tolist() == [-1.0, 0.0]


def test_the_graph_is_left_as_it_is() -> None:
    path = zoo.exported("llama", "torchscript")
    graph = load(path)
    before = str(graph), [repr(value) for value in graph.values()]
    Executor(graph)
    assert (str(graph), [repr(value) for value in graph.values()]) == before


def test_dims_as_python() -> None:
    a, b = dims.symbol("a; import os"), dims.symbol("b")
    names = {a: "s0", b: "s1"}.__getitem__
    for dim in (
        3, a, a + b, a * b + 2 * a - 7, dims.floordiv(a + 1, 2), dims.floordiv(a * b, 3) + b, dims.minimum(a, 5),
        dims.maximum(0, a - b), a**2, (a * b) / b, dims.floordiv(dims.floordiv(a, 2), 3) * 4, -a, a % 3,
    ):  # fmt: skip
        text = expression(dim, names)
        assert "import" not in text
        for sizes in ({a: 12, b: 5}, {a: 1, b: 1}, {a: 30, b: 7}):
            assert eval(text, {"s0": sizes[a], "s1": sizes[b]}) == dims.concrete((dim,), sizes)[0], text


def test_a_size_known_only_from_a_result() -> None:
    graph = _imported(
        "(float[N] x) => (float[A] y, int64[B] n) { zero = Constant<value = float {0.0}>() c = Greater(x, zero) y = Compress(x, c)"
        " n = Shape(y) }"
    )
    for stage in range(2):
        if stage:
            canonicalize(graph)
        made = Executor(graph)
        for values in ([1.0, -1.0, 2.0], [-1.0], [3.0, 4.0, 5.0]):
            y, n = made(torch.tensor(values))
            assert y.tolist() == [v for v in values if v > 0] and n.tolist() == [len(y)]


def test_direct_calls_equal_the_table() -> None:
    """Numbers beside tensors change neither rank nor type."""
    for dtype in (DType.FLOAT32, DType.FLOAT16, DType.INT64):
        for shape in ((), (1,), (1, 1)):
            graph = Graph("scalar", 20)
            x = Value("x", dtype, (3,))
            graph.inputs = [x]
            two = graph.constant(Array.of(np.full(shape, 2), dtype), "two")
            made = [graph.add(op, [x, two]).output for op in ("Add", "Sub", "Mul", "Div", "Greater")]
            made += [graph.add(op, [two, x]).output for op in ("Sub", "Div", "Less")]
            graph.outputs, graph.output_names = made, [str(i) for i in range(len(made))]
            for value in made:
                value.is_output = True
            given = torch.tensor([1, 3, 7], dtype=dtype.torch)
            constant = torch.full(shape, 2, dtype=dtype.torch)
            from fuser.operators import evaluate

            for value, actual in zip(made, Executor(graph)(given), strict=True):
                node = value.producer
                assert node is not None
                inputs = [given if v is x else constant for v in node.inputs]
                (expected,) = evaluate(node.op, "", {}, inputs)
                assert expected is not None and actual.dtype is expected.dtype and torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["imported", "canonical", "fused"])
@pytest.mark.parametrize(
    ("architecture", "exporter"), [("llama", "torchscript"), ("gpt2", "dynamo"), ("llama", "optimum")]
)
def test_runs_on_cuda(architecture: str, exporter: str, stage: str) -> None:
    path = zoo.exported(architecture, exporter)
    graph = _graphs(path)[stage]
    made = Executor(graph, device="cuda")
    for feeds in zoo.cases(path).values():
        outputs = _run(made, graph, feeds)
        assert zoo.relative_error(outputs, zoo.reference(architecture, feeds)) <= TOLERANCE
