"""Fused operators: signatures, their errors, and declared state."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fuser import dims
from fuser.constants import Array
from fuser.dtypes import DType
from fuser.fused import REGISTRY, FusedOp, Signature, fused_op
from fuser.graph import FUSER, Graph, Value
from fuser.pattern import CheckFailed, op
from fuser.rewriting import rewrite
from fuser.shapes import RULES, infer, infer_node

B, S, P = dims.symbol("batch"), dims.symbol("seq"), dims.symbol("past")


def value(name: str, *shape: Any) -> Value:
    return Value(name, DType.FLOAT32, tuple(shape))


def test_dims_are_replaced_to_the_end() -> None:
    """Through what replaces them, and where they replace one another in a circle, not for ever."""
    a, b, c = (dims.symbol(name) for name in "abc")
    assert dims.replace((a + 1, 2, "a"), {a: b, b: c}) == (c + 1, 2, "a")
    assert dims.replace(a, {a: a}) == a
    assert dims.replace(a, {a: b, b: a}) in (a, b)


def test_signature_binds_dims() -> None:
    signature = Signature.parse("x[*B, D], weight[D, N], bias[N]? -> y[*B, N], *rest[*B, D + N]")
    assert [str(argument) for argument in signature.inputs] == ["[*B, D]", "[D, N]", "[N]"]
    assert signature.inputs[2].optional and signature.outputs[1].variadic
    bound = signature.bind("linear", [value("x", B, S, 64), value("w", 64, 10), None])
    assert signature.output_shapes(bound) == [(B, S, 10), (B, S, 74)]


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((B, 64), (2048,)), "op: weight must be [D] with D=64, got [2048]"),
        (((B, 64), (1, 64)), "op: weight must be [D] with D=64, got [1, 64]"),
        (((), (64,)), "op: x must be [*B, D], got []"),
        (((B, 64), None), "op: weight is missing"),
    ],
)
def test_signature_refuses_other_shapes(shapes: tuple[Any, Any], text: str) -> None:
    signature = Signature.parse("x[*B, D], weight[D] -> y[*B, D]")
    values = [None if shape is None else value("v", *shape) for shape in shapes]
    with pytest.raises(CheckFailed) as failure:
        signature.bind("op", values)
    assert str(failure.value) == text


@pytest.fixture
def append() -> Iterator[FusedOp]:
    """A toy operator with a state: new rows are appended to a cache, and summed."""

    @fused_op("past[G, P, D], new[G, S, D] -> total[G, S], present[G, P + S, D]", state={"past": "present"})
    def append_rows(past: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return new.sum(-1), torch.cat([past, new], 1)

    @append_rows.source
    def source(past: Any, new: Any) -> Any:
        return op.ReduceSum(new, axes=(-1,), keepdims=0), op.Concat(past, new, axis=-2)

    yield append_rows
    del REGISTRY["append_rows"], RULES[FUSER, "append_rows"]


def test_state_is_matched_checked_and_declared(append: FusedOp) -> None:
    graph = Graph("state", 20)
    graph.inputs = [value("past", 2, P, 8), value("new", 2, S, 8)]
    graph.dim_sources = {P: (graph.inputs[0], 1), S: (graph.inputs[1], 1)}
    total = graph.add("ReduceSum", [graph.inputs[1]], {"axes": (-1,), "keepdims": 0})
    present = graph.add("Concat", graph.inputs, {"axis": -2})
    graph.outputs, graph.output_names = [total.output, present.output], ["total", "present"]
    for output in graph.outputs:
        output.is_output = True
    infer(graph)
    outcome = rewrite(graph, [append])
    graph.validate()
    assert outcome.fused == {"append_rows": 1} and outcome.checked == 1 and not outcome.misses
    (node,) = graph.nodes
    assert append.states(node) == [(graph.inputs[0], graph.outputs[1])]
    assert graph.outputs[1].shape == (2, P + S, 8)
    infer_node(graph, node)
    assert graph.outputs[0].shape == (2, S)


def test_state_must_name_an_input_and_an_output() -> None:
    with pytest.raises(ValueError, match="state past -> present"):
        fused_op("past[P, D] -> y[P, D]", state={"past": "present"})


def test_constants_are_one_number_only_when_they_are() -> None:
    assert Array.of([[2.0, 2.0]], DType.FLOAT32).scalar == 2.0
    assert Array.of([2.0, 3.0], DType.FLOAT32).scalar is None
    assert Array.of([1.0] * 65, DType.FLOAT32).scalar is None
