"""Generated from the declarations of every fused operator: what its lowerings compute, and that its sources are found."""

import math
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from fuser import dims, patterns
from fuser.canonicalize import canonicalize
from fuser.constants import Array
from fuser.dtypes import DType
from fuser.exporter import export
from fuser.fused import Argument, FusedOp
from fuser.graph import FUSER, Graph, Value
from fuser.lowering import TARGETS
from fuser.rewriting import rewrite
from fuser.shapes import infer_node
from tests import instances, text_graphs
from tests.instances import Instance

TOLERANCE = {DType.FLOAT32: 2e-6, DType.FLOAT16: 2e-3}  # relative, norm-wise, to the reference function in float64
OPSETS = (13, 17, 23)

EXAMPLES = [
    pytest.param(operator, example, id=f"{operator.name}-{number}")
    for operator in patterns.ALL
    for number, example in enumerate(operator.example_sets)
]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("operator", "example"), EXAMPLES)
def test_lowering_equals_reference(
    operator: FusedOp, example: dict[str, Any], dtype: DType, target: str, opset: int
) -> None:
    if operator.name == "rotary_table":
        dtype = DType.FLOAT32  # angles are never computed in less
    _lowered(operator, example, dtype, target, opset, TOLERANCE[dtype])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("operator", "example"), [p for p in EXAMPLES if "norm" in str(p.id)])
def test_norms_stay_in_float64(operator: FusedOp, example: dict[str, Any], target: str) -> None:
    _lowered(operator, example, DType.FLOAT64, target, 23, 1e-9)  # an epsilon is a float32 attribute


def _lowered(
    operator: FusedOp, example: dict[str, Any], dtype: DType, target: str, opset: int, tolerance: float
) -> None:
    """Runs a graph of one fused node and compares it with the reference."""
    graph, feeds = Graph("one", opset), {}
    values: list[Value] = []
    tensors: list[torch.Tensor | None] = []
    random = np.random.RandomState(0)
    for argument in operator.signature.inputs:
        if argument.name in example.get("without", ()):
            tensors.append(None)  # what is left out is last
            continue
        shape, kind = instances.shape_of(argument, example), instances.kind_of(argument.name, example)
        if kind == "sizes":  # of the result, as numbers
            wanted = instances.shape_of(Argument("", ("*M",)), example)
            array = np.array(dims.concrete(wanted, instances.sizes(example)))
        else:
            array = instances.drawn(random, dims.concrete(shape, instances.sizes(example)), kind, dtype)
        if kind == "sizes" or instances.is_weight(argument, example):
            stored = DType.INT64 if kind in (*instances.WHOLE, "sizes") else dtype
            value = graph.constant(Array.of(array, stored), argument.name)
        else:
            as_type = {"bool": DType.BOOL} | dict.fromkeys(instances.WHOLE, DType.INT64)
            value = Value(graph.fresh_name(argument.name), as_type.get(kind, dtype), shape)
            graph.inputs.append(value)
            for axis, dim in enumerate(shape):
                if not isinstance(dim, int):
                    graph.define(dim, value, axis)
            feeds[value.name] = array
        values.append(value)
        tensors.append(instances.exact(array, kind))
    attributes = instances.attributes_of(example)
    expected = operator.evaluate(tensors, attributes)
    node = graph.add(operator.name, values, attributes, domain=FUSER, outputs=len(expected))
    infer_node(graph, node)
    graph.outputs, graph.output_names = node.outputs, [value.name for value in node.outputs]
    for value in node.outputs:
        value.is_output = True
    model = export(graph, target, {}).model
    if target == "functions":
        onnx.checker.check_model(model)
    for actual, reference in zip(text_graphs.run(model, feeds), expected, strict=True):
        assert node.output.dtype is not None
        assert actual.dtype == (dtype if node.output.dtype.is_float else node.output.dtype).numpy
        assert _error(actual, reference.numpy()) <= tolerance


@cache
def _instances() -> list[Instance]:
    return [instance for operator in patterns.ALL for instance in instances.instances(operator)]


@pytest.mark.parametrize("instance", _instances(), ids=str)
def test_source_is_fused(instance: Instance) -> None:
    operator, feeds = instance.operator, instance.feeds()
    expected = instance.reference(feeds)
    unfused = _run(instance.graph.clone(), "functions", feeds)

    graph = instance.graph.clone()
    canonicalize(graph)
    outcome = rewrite(graph, patterns.ALL)
    graph.validate()
    beyond = set() if instance.source.reader is None else {instance.source.reader.node.op}
    fused = [node for node in graph.nodes if node.domain == FUSER and node.op not in {"Rsqrt", "gated_mlp", *beyond}]
    assert [node.op for node in fused] == [operator.name] or operator.name == "gated_mlp", str(graph)
    (node,) = (node for node in graph.nodes if node.is_a(operator.name, FUSER))
    for name, value in instances.attributes_of(instance.example).items():
        found = node.attributes[name]
        digits = 1e-6 if instance.dtype is DType.FLOAT32 else 2e-2  # an epsilon may be stored in float16
        assert found == value or (isinstance(value, float) and math.isclose(found, value, rel_tol=digits)), name
    assert [miss for miss in outcome.misses if miss.fusion == operator.name] == []

    tolerance = TOLERANCE[instance.dtype]
    for target in TARGETS:
        for actual, before, reference in zip(_run(graph, target, feeds), unfused, expected, strict=False):
            assert actual.dtype == before.dtype
            assert _error(actual, reference) <= tolerance
            assert _error(before, reference) <= tolerance, "the instance is not the operator"


def _error(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """Relative, norm-wise; where an operator leaves its result undefined the reference is no number."""
    defined = ~np.isnan(reference)
    assert actual.shape == reference.shape and defined.any()
    return text_graphs.relative_error(actual[defined], reference[defined])


def _run(graph: Graph, target: str, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    return text_graphs.run(export(graph, target, {}).model, feeds)


def test_every_alternative_is_built() -> None:
    for operator in patterns.ALL:
        taken = set().union(*(i.taken for i in _instances() if i.operator is operator))
        for source in operator.sources:
            assert any(i.source is source for i in _instances()), f"{operator.name}: {source.function.__name__}"
            missing = instances.alternatives(source) - taken
            assert not missing, f"{operator.name}: {source.function.__name__}, {len(missing)} alternatives"


def test_every_operator_has_a_lowering_for_every_target() -> None:
    for operator in patterns.ALL:
        assert all(operator.lowering(target) for target in TARGETS)
        is_made = operator.name == "fake_quantize"  # by quantizing alone
        assert operator.example_sets and (operator.sources or operator.recognizer or is_made)
