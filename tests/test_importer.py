"""What comes in through a file: every form ONNX has for a model, and every way a file can be wrong."""

import os
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

import fuser
from fuser.canonicalize import canonicalize
from fuser.exporter import export
from fuser.graph import Graph
from fuser.importer import from_proto, load
from tests import models, zoo
from tests.models import one, parsed, tensor


def through(model: ModelProto, folder: Path = Path()) -> ModelProto:
    """Import, canonicalize, export: what a model becomes when nothing in it is fused."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = from_proto(copy, folder)
    graph.validate()
    canonicalize(graph)
    graph.validate()
    return export(graph, "ort", {}).model


def same(model: ModelProto, feeds: models.Feeds, *, exactly: bool = True) -> ModelProto:
    """Asserts that a model and what becomes of it give the same in ONNX Runtime; returns the latter."""
    result = through(model)
    onnx.checker.check_model(result)
    for actual, expected in zip(models.run(result, feeds), models.run(model, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0 if exactly else 1e-6)
    return result


X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# Opsets and functions


@pytest.mark.parametrize("opset", models.OPSETS)
def test_every_opset_fuses_and_equals(opset: int) -> None:
    model = models.norms(opset)
    onnx.checker.check_model(model)
    fused = fuser.fuse(model)
    assert fused.report.fused == models.NORMS
    if models.runs(opset):
        assert fused.report.verification.passed and not fused.report.verification.skipped
    else:
        assert "does not run the original" in fused.report.verification.skipped


@pytest.mark.parametrize("opset", [1, 12, models.OPSETS[-1] + 1, 10_000])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(fuser.InputError, match=rf"opset {opset}; fuser reads 13 to {models.OPSETS[-1]}"):
        fuser.fuse(one("(float[N] x) => (float[N] y) { y = Relu(x) }", opset=opset))


def test_no_standard_opset() -> None:
    with pytest.raises(fuser.InputError, match="names no opset of the standard operators"):
        fuser.fuse(
            parsed('<ir_version: 8, opset_import: ["other": 1]> g (float[N] x) => (float[N] y) { y = other.F(x) }')
        )


def test_ai_onnx_is_the_standard_domain() -> None:
    model = parsed(
        '<ir_version: 8, opset_import: ["ai.onnx": 17]> g (float[N] x) => (float[N] y) { y = ai.onnx.Identity(x) }'
    )
    assert ops(through(model)) == ["Identity"]


FUNCTION = """<domain: "l", opset_import: ["": 17, "l": 1]> outer <scale: float = 2.0> (a) => (b) {
    c = l.inner <by: float = @scale> (a)
    b = Relu(c)
}
<domain: "l", opset_import: ["": 17]> inner <by> (a) => (b) {
    k = Constant <value_float: float = @by> ()
    b = Mul(a, k)
}"""


def test_functions_are_inlined() -> None:
    model = one(
        f"(float[N, M] x) => (float[N, M] y, float[N, M] z) {{ y = l.outer(x) z = l.outer <scale = -3.0> (x) }} {FUNCTION}",
        more=', "l": 1',
    )
    result = same(model, {"x": X})
    assert not result.functions
    assert sorted(ops(result)) == ["Mul", "Mul", "Relu", "Relu"]


def test_functions_of_another_opset() -> None:
    model = one(
        "(float[N, M] x) => (float[N, M] y) { y = l.f(x) } "
        '<domain: "l", opset_import: ["": 17]> f (a) => (b) { b = ReduceMean <axes = [1]> (a) }',
        opset=18,
        more=', "l": 1',
    )
    result = through(model)  # ONNX Runtime does not take the original
    assert ops(result) == ["ReduceMean"]
    np.testing.assert_array_equal(models.run(result, {"x": X})[0], X.mean(1, keepdims=True))


def test_functions_whose_domain_has_several_versions() -> None:
    model = one(f"(float[N, M] x) => (float[N, M] y) {{ y = l.outer(x) }} {FUNCTION}", more=', "l": 7')
    assert sorted(ops(same(model, {"x": X}))) == ["Mul", "Relu"]


def test_functions_inside_control_flow() -> None:
    body = (
        "(float[N, M] x, bool c) => (float[N, M] y) { y = If (c) <then_branch = t () => (float[N, M] a) { a = l.f(x) }"
    )
    body += ", else_branch = e () => (float[N, M] b) { b = Neg(x) }> }"
    model = one(body + ' <domain: "l", opset_import: ["": 17]> f (a) => (b) { b = Relu(a) }', opset=17, more=', "l": 1')
    for c in (True, False):
        assert not same(model, {"x": X, "c": np.array(c)}).functions


def doubling(depth: int) -> ModelProto:
    """Functions each of which calls the next twice."""
    header = '<domain: "l", opset_import: ["": 18, "l": 1]>'
    calls = [f"c = l.f{i + 1}(a) b = l.f{i + 1}(c)" for i in range(depth)] + ["b = Relu(a)"]
    functions = [f"{header} f{i} (a) => (b) {{ {body} }}" for i, body in enumerate(calls)]
    return one("(float[N] x) => (float[N] y) { y = l.f0(x) }" + "".join(functions), opset=18, more=', "l": 1')


def test_exponential_functions_are_refused_quickly() -> None:
    model = doubling(24)
    assert model.ByteSize() < 1600
    start = time.perf_counter()
    with pytest.raises(fuser.InputError, match=r"expands? to more than"):
        fuser.fuse(model)
    assert time.perf_counter() - start < 0.5


def test_exponential_functions_inside_control_flow_are_refused_quickly() -> None:
    model = doubling(24)
    for function in model.functions[:-1]:
        # The second call moves into both branches of an If.
        call = function.node.pop()
        body = helper.make_graph([call], "body", [], [tensor("b", None)])
        function.node.append(helper.make_node("Constant", [], ["true"], value=numpy_helper.from_array(np.array(True))))
        function.node.append(helper.make_node("If", ["true"], ["b_"], then_branch=body, else_branch=body))
        function.output[0] = "b_"
    start = time.perf_counter()
    with pytest.raises(fuser.InputError, match=r"expands? to more than"):
        fuser.fuse(model)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "functions",
    [
        "f (a) => (b) { b = l.f(a) }",
        "f (a) => (b) { c = l.f(a) b = Relu(c) }",
        'f (a) => (b) { b = l.h(a) } <domain: "l", opset_import: ["": 18, "l": 1]> h (a) => (b) { b = l.f(a) }',
    ],
)
def test_recursive_functions_are_refused(functions: str) -> None:
    model = one(
        f'(float[N] x) => (float[N] y) {{ y = l.f(x) }} <domain: "l", opset_import: ["": 18, "l": 1]> {functions}',
        opset=18,
        more=', "l": 1',
    )
    with pytest.raises(fuser.InputError, match=r"call one another in a circle|expands? to more than"):
        fuser.fuse(model)


# Control flow

LOOP = """(int64 n, float[N, M] x) => (float[N, M] y, float[K, N, M] all) {
    keep = Constant <value = bool {1}> ()
    twice = Add(x, x)
    y, all = Loop(n, keep, x) <body = b (int64 i, bool go, float[N, M] state) => 
            (bool go_on, float[N, M] next, float[N, M] seen) {
        go_on = Identity(go)
        next = Add(state, twice)
        seen = Mul(next, w)
    }>
}"""


def test_loop_with_captures() -> None:
    model = one(LOOP, {"w": np.full((1, 3), 0.5, np.float32)})
    result = same(model, {"n": np.array(4), "x": X})
    assert result.graph.node[-1].op_type == "Loop"
    before, after = (next(n for n in m.graph.node if n.op_type == "Loop").attribute[0].g for m in (model, result))
    assert before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)


def test_scan() -> None:
    model = one(
        """(float[M] start, float[N, M] xs) => (float[M] last, float[N, M] sums) {
            last, sums = Scan <num_scan_inputs = 1, body = b (float[M] a, float[M] x) => (float[M] t, float[M] s) {
                t = Add(a, x)
                s = Mul(t, w)
            }> (start, xs)
        }""",
        {"w": np.full(3, 2, np.float32)},
    )
    same(model, {"start": np.ones(3, np.float32), "xs": X})


def test_nested_bodies_capture_from_every_level() -> None:
    model = one(
        """(float[N, M] x, bool c) => (float[N, M] y) {
            outer = Sigmoid(x)
            gate = Mul(x, outer)
            y = If (c) <then_branch = t () => (float[N, M] a) {
                middle = Add(gate, k)
                a = If (c) <then_branch = tt () => (float[N, M] aa) { aa = Add(middle, gate) },
                            else_branch = te () => (float[N, M] ab) { ab = Mul(k, x) }>
            }, else_branch = e () => (float[N, M] b) { b = Neg(x) }>
        }""",
        {"k": np.array(3, np.float32)},
    )
    for c in (True, False):
        same(model, {"x": X, "c": np.array(c)}, exactly=False)


@pytest.mark.parametrize("target", ["ort", "functions"])
def test_captured_value_of_a_fusion_stays(target: str) -> None:
    """The body reads by name what SiLU and RMSNorm would swallow, and what they make."""
    nodes = models.Nodes(17)
    norm = nodes.rms_norm("x", "gamma")
    gate = nodes("Sigmoid", norm)
    silu = nodes("Mul", norm, gate)
    unread = nodes.silu("x")
    branches = [
        helper.make_graph([helper.make_node("Add", [a, b], [f"{a}_out"])], "body", [], [tensor(f"{a}_out", None)])
        for a, b in ((gate, silu), (unread, norm))
    ]
    nodes("If", "c", name="if", then_branch=branches[0], else_branch=branches[1])
    nodes.protos[-1].output[0] = "y"
    shape = ["N", 8]
    model = nodes.model(
        [tensor("x", shape), tensor("c", [], TensorProto.BOOL)],
        [tensor("y", shape)],
        models.weights_of({"gamma": (8,)}),
    )
    fused = fuser.fuse(model, target=target)
    assert fused.report.fused == {"rms_norm": 1, "silu": 1}  # not the one whose sigmoid is captured
    result = fused._artifact.model
    for c in (True, False):
        feeds = {"x": models.random(3, 8), "c": np.array(c)}
        np.testing.assert_allclose(models.run(result, feeds)[0], models.run(model, feeds)[0], rtol=2e-5, atol=1e-6)


def test_initializer_read_only_inside_a_body_stays() -> None:
    model = one(
        """(float[N] x, bool c) => (float[N] y) {
            y = If (c) <then_branch = t () => (float[N] a) { a = Add(x, k) },
                        else_branch = e () => (float[N] b) { b = Mul(x, j) }>
        }""",
        {"k": np.array([1], np.float32), "j": np.array([2], np.float32), "unused": np.zeros(4, np.float32)},
    )
    for c in (True, False):
        result = same(model, {"x": X[0], "c": np.array(c)})
        assert [t.name for t in result.graph.initializer] == ["k", "j"]


def test_names_inside_bodies_stay_distinct() -> None:
    """A value fuser makes must not take a name that a body uses."""
    model = one(
        """(float[N] x, bool c) => (float[N] y) {
            z = Div(x, two)
            y = If (c) <then_branch = t () => (float[N] reciprocal) { reciprocal = Add(z, z) },
                        else_branch = e () => (float[N] b) { z_1 = Neg(z) b = Neg(z_1) }>
        }""",
        {"two": np.array([2], np.float32)},
    )
    result = same(model, {"x": X[0], "c": np.array(True)})
    outer = {name for node in result.graph.node for name in (*node.input, *node.output)}
    assert not outer & {"reciprocal", "b", "z_1"}


# Constants and initializers

CONSTANTS: dict[str, tuple[AttributeProto, Any]] = {
    "value": (helper.make_attribute("value", numpy_helper.from_array(np.array([1.5, 2]))), np.array([1.5, 2])),
    "value_float": (helper.make_attribute("value_float", 2.5), np.float32(2.5)),
    "value_floats": (helper.make_attribute("value_floats", [1.0, 2.5]), np.float32([1, 2.5])),
    "value_floats_empty": (
        helper.make_attribute("value_floats", [], attr_type=AttributeProto.FLOATS),
        np.zeros(0, np.float32),
    ),
    "value_int": (helper.make_attribute("value_int", -7), np.int64(-7)),
    "value_ints": (helper.make_attribute("value_ints", [3, 4]), np.int64([3, 4])),
    "value_ints_empty": (
        helper.make_attribute("value_ints", [], attr_type=AttributeProto.INTS),
        np.zeros(0, np.int64),
    ),
    "value_string": (helper.make_attribute("value_string", "tail"), np.array("tail", object)),
    "value_strings": (helper.make_attribute("value_strings", ["a", "bc"]), np.array(["a", "bc"], object)),
    "sparse_value": (
        helper.make_attribute(
            "sparse_value",
            helper.make_sparse_tensor(
                helper.make_tensor("v", TensorProto.FLOAT, [2], [5, 6]),
                helper.make_tensor("i", TensorProto.INT64, [2], [1, 3]),
                [2, 2],
            ),
        ),
        np.float32([[0, 5], [0, 6]]),
    ),
}


@pytest.mark.parametrize("form", CONSTANTS)
def test_constant_nodes_in_every_form(form: str) -> None:
    attribute, expected = CONSTANTS[form]
    node = onnx.NodeProto(op_type="Constant", output=["c"])
    node.attribute.append(attribute)
    dtype = TensorProto.STRING if "string" in form else helper.np_dtype_to_tensor_dtype(np.asarray(expected).dtype)
    graph = helper.make_graph(
        [node, helper.make_node("Identity", ["c"], ["y"])], "g", [], [tensor("y", np.shape(expected), dtype)]
    )
    result = through(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    (found,) = models.run(result, {})
    np.testing.assert_array_equal(found, expected)
    assert np.asarray(found).dtype == np.asarray(expected).dtype


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_initializer(linear: bool) -> None:
    indices = [1, 5] if linear else [0, 1, 1, 2]
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("w", TensorProto.FLOAT, [2], [5, 6]),
        helper.make_tensor("i", TensorProto.INT64, [2] if linear else [2, 2], indices),
        [2, 3],
    )
    model = one("(float[N, M] x) => (float[N, M] y) { y = Mul(x, w) }")
    model.graph.sparse_initializer.append(sparse)
    (y,) = models.run(through(model), {"x": X})
    np.testing.assert_array_equal(y, X * np.float32([[0, 5, 0], [0, 0, 6]]))


@pytest.mark.parametrize(
    ("indices", "dims"), [([9, 1], [2]), ([-1, 1], [2]), ([0, 1, 5, 2], [2, 2]), ([1, 2, 3], [3]), ([0], [1])]
)
def test_bad_sparse_initializer(indices: list[int], dims: list[int]) -> None:
    model = one("(float[N, M] x) => (float[N, M] y) { y = Mul(x, w) }")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            helper.make_tensor("w", TensorProto.FLOAT, [2], [5, 6]),
            helper.make_tensor("i", TensorProto.INT64, dims, indices),
            [2, 3],
        )
    )
    with pytest.raises(fuser.InputError, match="sparse tensor 'w'"):
        fuser.fuse(model)


NARROW = {
    TensorProto.BFLOAT16: np.array([[1.5, -2], [3, 0.25]], ml_dtypes.bfloat16),
    TensorProto.FLOAT8E4M3FN: np.array([[1.5, -2], [3, 0.25]], ml_dtypes.float8_e4m3fn),
    TensorProto.FLOAT8E5M2: np.array([[1.5, -2], [3, 0.25]], ml_dtypes.float8_e5m2),
    TensorProto.FLOAT8E4M3FNUZ: np.array([[1.5, -2], [3, 0.25]], ml_dtypes.float8_e4m3fnuz),
    TensorProto.FLOAT8E5M2FNUZ: np.array([[1.5, -2], [3, 0.25]], ml_dtypes.float8_e5m2fnuz),
    TensorProto.INT4: np.array([[1, -2, 7], [-8, 3, 0], [5, 5, -1]], ml_dtypes.int4),
    TensorProto.UINT4: np.array([[1, 2, 7], [8, 3, 0], [15, 5, 9]], ml_dtypes.uint4),
    TensorProto.STRING: np.array(["a", "", "ä", "long " * 50], object),
    TensorProto.BOOL: np.array([True, False]),
    TensorProto.UINT64: np.array([2**64 - 1, 0], np.uint64),
    TensorProto.COMPLEX64: np.array([1 + 2j, -3], np.complex64),
}


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=TensorProto.DataType.Name)
def test_element_types_survive(dtype: int, typed: bool, external: bool, tmp_path: Path) -> None:
    """An initializer of every type, in raw bytes, in typed fields and in external data, goes out as it came in."""
    data = NARROW[dtype]
    if dtype == TensorProto.STRING and external:
        pytest.skip("strings cannot lie in external data")
    if typed and not external:
        proto = helper.make_tensor("w", dtype, data.shape, data.reshape(-1).tolist())
    else:
        proto = numpy_helper.from_array(data, "w")
    model = one("(float[N] x) => (float[N] y, float z) { y = Identity(x) z = Identity(w) }", opset=21)
    model.graph.output[1].type.tensor_type.elem_type = dtype
    model.graph.output[1].type.tensor_type.shape.CopyFrom(tensor("z", data.shape).type.tensor_type.shape)
    model.graph.initializer.append(proto)
    if external:
        models.save_external(model, tmp_path / "m.onnx")
        result = export(load(tmp_path / "m.onnx"), "ort", {}).model
    else:
        result = through(model)
    (found,) = result.graph.initializer
    assert found.data_type == dtype
    np.testing.assert_array_equal(numpy_helper.to_array(found), numpy_helper.to_array(proto))
    onnx.checker.check_model(result)


def test_zero_size_and_scalar_tensors() -> None:
    model = one(
        "(float[N, 3] x) => (float[M, 3] y, float s, float[0, 3] e) { c = Concat <axis = 0> (x, none) y = Mul(c, two)"
        " s = Identity(two) e = Identity(none) }",
        {"none": np.zeros((0, 3), np.float32), "two": np.array(2, np.float32)},
    )
    same(model, {"x": X})
    same(model, {"x": X[:0]})


@pytest.mark.parametrize("target", ["ort", "functions"])
def test_initializer_that_is_also_an_input(target: str, tmp_path: Path) -> None:
    """What old exporters list as inputs too is a weight all the same."""
    model = models.norms()
    for weight in model.graph.initializer:
        model.graph.input.append(tensor(weight.name, list(weight.dims), weight.data_type))
    onnx.checker.check_model(model)
    fused = fuser.fuse(model, target=target)
    assert fused.report.fused == models.NORMS
    assert not fused.report.verification.skipped
    assert [i.name for i in fused._artifact.model.graph.input] == ["x"]


# The interface


def test_output_that_is_an_input_or_a_constant_or_both() -> None:
    model = one(
        "(float[N, M] x, float[2] z) => (float[N, M] x, float[2] k, float[2] c, float[2] n) {"
        " c = Constant <value = float[2] {1, 2}> () n = Neg(z) }",
        {"k": np.array([3, 4], np.float32)},
    )
    result = through(model)
    assert [o.name for o in result.graph.output][1:] == ["k", "c", "n"]
    model.graph.output[0].name = "y"
    model.graph.node.append(helper.make_node("Identity", ["x"], ["y"]))
    same(model, {"x": X, "z": X[0, :2]})


def test_graph_without_nodes() -> None:
    model = one("(float[N, M] x) => (float[2] k) { }", {"k": np.array([3, 4], np.float32)})
    np.testing.assert_array_equal(models.run(through(model), {"x": X})[0], [3, 4])


def test_output_listed_twice() -> None:
    model = one("(float[N, M] x) => (float[N, M] y) { a = Sigmoid(x) y = Mul(x, a) }")
    model.graph.output.append(model.graph.output[0])
    result = fuser.fuse(model, verify=False)._artifact.model
    assert [o.name for o in result.graph.output] == ["y", "y"]
    first, second = models.run(result, {"x": X})
    np.testing.assert_allclose(first, X / (1 + np.exp(-X)), rtol=1e-6)
    np.testing.assert_array_equal(first, second)


def test_two_outputs_of_one_value() -> None:
    model = one("(float[N, M] x) => (float[N, M] a, float[N, M] b) { t = Relu(x) a = Identity(t) b = Identity(t) }")
    result = same(model, {"x": X})
    assert [o.name for o in result.graph.output] == ["a", "b"]


@pytest.mark.parametrize("target", ["ort", "functions"])
def test_output_inside_a_fusion_stays(target: str) -> None:
    nodes = models.Nodes(17)
    y = nodes.silu(nodes.rms_norm("x", "gamma"))
    outputs = [tensor(node.output[0], None) for node in nodes.protos]
    model = nodes.model([tensor("x", ["N", 8])], outputs, models.weights_of({"gamma": (8,)}))
    assert y == outputs[-1].name
    fused = fuser.fuse(model, target=target)
    assert fused.report.fused == {}
    # ... and when only the sigmoid is asked for as well, the norm before it is fused.
    del model.graph.output[:-2]
    fused = fuser.fuse(model, target=target)
    assert fused.report.fused == {"rms_norm": 1}
    assert [o.name for o in fused._artifact.model.graph.output] == [o.name for o in outputs[-2:]]


def test_missing_and_duplicate_node_names() -> None:
    model = models.norms()
    for name in ("", "same"):
        for node in model.graph.node:
            node.name = name
        fused = fuser.fuse(model)
        assert fused.report.fused == models.NORMS
        names = [node.name for node in fused._artifact.model.graph.node]
        assert len(set(names)) == len(names) and "" not in names


def test_optional_inputs_and_outputs_left_out() -> None:
    nodes = [
        helper.make_node("Clip", ["x", "", "top"], ["c"]),
        helper.make_node("GRU", ["seq", "w", "r", "", "", "h"], ["", "last"], hidden_size=2),
        helper.make_node("LSTM", ["seq", "w2", "r2", ""], ["all", "", "cell"], hidden_size=2),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("x", ["N", 3]), tensor("seq", ["S", 1, 3]), tensor("h", [1, 1, 2])],
        [tensor("c", ["N", 3]), tensor("last", [1, 1, 2]), tensor("all", ["S", 1, 1, 2]), tensor("cell", [1, 1, 2])],
        [
            *models.weights_of({"w": (1, 6, 3), "r": (1, 6, 2), "w2": (1, 8, 3), "r2": (1, 8, 2)}),
            numpy_helper.from_array(np.float32(1.5), "top"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = same(model, {"x": X, "seq": models.random(4, 1, 3), "h": models.random(1, 1, 2)})
    by_op = {node.op_type: node for node in result.graph.node}
    assert list(by_op["Clip"].input) == ["x", "", "top"]
    assert list(by_op["GRU"].output) == ["", "last"]
    assert list(by_op["LSTM"].output) == ["all", "", "cell"]
    assert list(by_op["GRU"].input) == ["seq", "w", "r", "", "", "h"]


def test_sequence_and_optional_inputs() -> None:
    """Inputs that are no tensors pass through; the end-to-end check says that it cannot be made."""
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [None, 3]))
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [None]))
    nodes = [
        helper.make_node("SequenceAt", ["list", "zero"], ["first"]),
        helper.make_node("Sigmoid", ["first"], ["gate"]),
        helper.make_node("Mul", ["first", "gate"], ["y"]),
        helper.make_node("OptionalHasElement", ["maybe"], ["given"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_value_info("list", sequence), helper.make_value_info("maybe", optional)],
        [tensor("y", [None, 3]), tensor("given", [], TensorProto.BOOL)],
        [numpy_helper.from_array(np.array(0), "zero")],
    )
    graph.value_info.append(tensor("first", [None, 3]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    fused = fuser.fuse(model)
    assert fused.report.fused == {"silu": 1}
    assert "'list'" in fused.report.verification.skipped
    assert [i.type for i in fused._artifact.model.graph.input] == [i.type for i in graph.input]
    feeds = {"list": [X], "maybe": X[0]}
    for actual, expected in zip(models.run(fused._artifact.model, feeds), models.run(model, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_sequence_outputs_are_compared() -> None:
    model = one(
        "(float[N, M] x) => (float y, float[N, M] z) { g = Sigmoid(x) z = Mul(x, g) y = SequenceConstruct(z, x) }"
    )
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.output[0].type.CopyFrom(sequence)
    fused = fuser.fuse(model)
    assert fused.report.fused == {"silu": 1}
    assert fused.report.verification.passed and not fused.report.verification.skipped


def test_model_with_random_numbers_is_not_called_different() -> None:
    model = one(
        "(float[N, M] x) => (float[N, M] y) { g = Sigmoid(x) a = Mul(x, g) r = RandomNormalLike(a) y = Add(a, r) }"
    )
    fused = fuser.fuse(model)
    assert fused.report.fused == {"silu": 1}
    assert "differ from run to run" in fused.report.verification.skipped


def test_unknown_shapes_everywhere() -> None:
    """Inputs without a shape or without names for their dims are computed with as well as can be."""
    nodes = models.Nodes(17)
    y = nodes("Reshape", nodes.silu(nodes("Reshape", "x", nodes.const([0, -1]))), nodes.const([-1]))
    for shape in (None, [None, None, 4], ["", "-1", 4]):
        inputs = [tensor("x", shape)]
        model = nodes.model(inputs, [tensor(y, None)])
        fused = fuser.fuse(model, verify=False)
        feeds = {"x": models.random(2, 3, 4)}
        actual, expected = (models.run(m, feeds)[0] for m in (fused._artifact.model, model))
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_negative_sizes_mean_unknown() -> None:
    model = models.norms()
    for axis in (0, 1):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = -1
        model.graph.output[0].type.tensor_type.shape.dim[axis].dim_value = -1
    model.graph.value_info.append(tensor(model.graph.node[0].output[0], [-1, -1, 24]))
    fused = fuser.fuse(model, verify=False)
    assert fused.report.fused == models.NORMS
    feeds = {"x": models.random(2, 3, 24)}
    actual, expected = (models.run(m, feeds)[0] for m in (fused._artifact.model, models.norms()))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# Custom operators


def odd_attributes() -> list[AttributeProto]:
    """One attribute of every kind, the odd ones included."""
    body = helper.make_graph([helper.make_node("Relu", ["p"], ["q"])], "body", [tensor("p", [1])], [tensor("q", [1])])
    sparse = CONSTANTS["sparse_value"][0].sparse_tensor
    type_proto = helper.make_tensor_type_proto(TensorProto.FLOAT16, ["N", 3])
    made = [
        helper.make_attribute("f", 0.1),
        helper.make_attribute("nan", float("nan")),
        helper.make_attribute("i", -(2**63)),
        helper.make_attribute("s", "text"),
        helper.make_attribute("empty", ""),
        helper.make_attribute("bytes", b"\xff\xfe\x00"),
        helper.make_attribute("t", numpy_helper.from_array(np.arange(3), "named")),
        helper.make_attribute("g", body),
        helper.make_attribute("sparse", sparse),
        helper.make_attribute("type", type_proto),
        helper.make_attribute("floats", [1.0, 2.0]),
        helper.make_attribute("ints", [1, 2]),
        helper.make_attribute("strings", ["a", "b"]),
        helper.make_attribute("odd_strings", [b"\xff", b"ok"]),
        helper.make_attribute("tensors", [numpy_helper.from_array(np.arange(3), "named")]),
        helper.make_attribute("graphs", [body, body]),
        helper.make_attribute("types", [type_proto]),
    ]
    lists = ("FLOATS", "INTS", "STRINGS", "TENSORS", "GRAPHS", "TYPE_PROTOS", "SPARSE_TENSORS")
    return made + [AttributeProto(name=kind, type=AttributeProto.AttributeType.Value(kind)) for kind in lists]


def test_custom_operator_passes_through() -> None:
    model = one("(float[N] x) => (float[N] y) { h = Relu(x) y = other.Thing(h, h) }", more=', "other": 3')
    node = model.graph.node[1]
    node.attribute.extend(odd_attributes())
    node.metadata_props.add(key="k", value="v")
    result = through(model)
    (found,) = (n for n in result.graph.node if n.domain == "other")
    before = {a.name: a.SerializeToString(deterministic=True) for a in node.attribute}
    after = {a.name: a.SerializeToString(deterministic=True) for a in found.attribute}
    for attribute in found.attribute:
        if attribute.type == AttributeProto.TENSOR:
            attribute.t.name = "named"  # a tensor's own name means nothing inside an attribute
            after[attribute.name] = attribute.SerializeToString(deterministic=True)
    assert after == before
    assert {(e.domain, e.version) for e in result.opset_import} == {("", 17), ("other", 3)}
    assert [(p.key, p.value) for p in found.metadata_props] == [("k", "v")]


def test_equal_custom_operators_stay_two() -> None:
    """Nothing says that an operator fuser does not know gives the same twice."""
    model = one("(float[N] x) => (float[N] y, float[N] z) { y = other.Draw(x) z = other.Draw(x) }", more=', "other": 1')
    assert ops(through(model)) == ["Draw", "Draw"]


# Wrong models


def wrong(text: str, *, weights: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(fuser.InputError) as caught:
        fuser.fuse(one(text, weights, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_graphs() -> None:
    assert "'y' is made by no node" in wrong("(float[N] x) => (float[N] y) { z = Relu(x) }")
    assert "reads 'a', which is made by no node" in wrong("(float[N] x) => (float[N] y) { y = Relu(a) }")
    assert "only later" in wrong("(float[N] x) => (float[N] y) { y = Relu(a) a = Relu(x) }")
    assert "'y' is made twice" in wrong("(float[N] x) => (float[N] y) { y = Relu(x) y = Neg(x) }")
    assert "'x' is made twice" in wrong("(float[N] x) => (float[N] x) { x = Relu(x) }")
    assert "'k' is made twice" in wrong(
        "(float[N] x) => (float[N] k) { k = Relu(x) }", weights={"k": np.ones(2, np.float32)}
    )
    loop = "(float[N] x) => (float[N] y) { a = Add(x, b) b = Relu(a) y = Neg(b) }"
    assert "only later" in wrong(loop)
    captured = "(bool c) => (float[N] y) { y = If (c) <then_branch = t () => (float[1] a) { a = Relu(gone) },"
    assert "'gone'" in wrong(captured + " else_branch = e () => (float[1] b) { b = Relu(gone) }> }")


def test_nodes_that_their_operators_do_not_allow() -> None:
    assert "(Relu) has 2 inputs" in wrong("(float[N] x) => (float[N] y) { y = Relu(x, x) }")
    assert "(Add) has 1 inputs" in wrong("(float[N] x) => (float[N] y) { y = Add(x) }")
    assert "(Relu) has 2 outputs" in wrong("(float[N] x) => (float[N] y) { y, z = Relu(x) }")
    assert "(Concat) lacks its attribute axis" in wrong("(float[N] x) => (float[N] y) { y = Concat(x, x) }")
    assert "does not fit its inputs" in wrong("(float[N] x) => (float[N] y) { y = Transpose <perm = [3]> (x) }")


def test_things_declared_twice() -> None:
    model = one("(float[N] x) => (float[N] y) { y = Relu(x) }")
    model.graph.input.append(model.graph.input[0])
    with pytest.raises(fuser.InputError, match="input 'x' is declared twice"):
        fuser.fuse(model)
    model = one("(float[N] x) => (float[N] y) { y = Add(x, k) }", {"k": np.ones(1, np.float32)})
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "k"))
    with pytest.raises(fuser.InputError, match="initializer 'k' is declared twice"):
        fuser.fuse(model)


@pytest.mark.parametrize("count", [0, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "field"),
    [
        (TensorProto.FLOAT, "float_data"),
        (TensorProto.FLOAT16, "int32_data"),
        (TensorProto.BOOL, "int32_data"),
        (TensorProto.INT64, "int64_data"),
        (TensorProto.UINT64, "uint64_data"),
        (TensorProto.DOUBLE, "double_data"),
        (TensorProto.STRING, "string_data"),
        (TensorProto.COMPLEX64, "float_data"),
        (TensorProto.INT4, "int32_data"),
    ],
)
def test_typed_data_that_does_not_fill_the_shape(dtype: int, field: str, count: int) -> None:
    model = one("(float[N] x) => (float y, float[N] z) { y = Identity(k) z = Relu(x) }", opset=21)
    weight = model.graph.initializer.add(name="k", data_type=dtype, dims=[3])
    if dtype == TensorProto.INT4:
        count += count == 2  # two bytes hold three elements
    getattr(weight, field).extend([b"s"] * count if dtype == TensorProto.STRING else [1] * count)
    with pytest.raises(fuser.InputError, match="tensor 'k' holds"):
        fuser.fuse(model)


def test_raw_data_that_does_not_fill_the_shape() -> None:
    model = one("(float[N] x) => (float[N] y) { y = Add(x, k) }")
    model.graph.initializer.add(name="k", data_type=1, dims=[3], raw_data=b"\0" * 11)
    with pytest.raises(fuser.InputError, match=r"tensor 'k' holds 11 bytes, its shape \[3\] needs 12"):
        fuser.fuse(model)
    model.graph.initializer[0].dims[0] = -3
    with pytest.raises(fuser.InputError, match="negative dim"):
        fuser.fuse(model)
    model.graph.initializer[0].data_type = 4711
    with pytest.raises(fuser.InputError, match="element type fuser does not know"):
        fuser.fuse(model)


def test_names_that_are_not_text() -> None:
    data = one("(float[N] x) => (float[N] yyyy) { yyyy = Relu(x) }").SerializeToString().replace(b"yyyy", b"y\xff\xfey")
    model = ModelProto()
    model.ParseFromString(data)
    with pytest.raises(fuser.InputError, match="not UTF-8"):
        fuser.fuse(model)


# Files


def test_truncated_files_at_every_length(tmp_path: Path) -> None:
    """A model cut short is refused, or happens to be a smaller model; it is never anything else."""
    data = models.norms().SerializeToString()
    path = tmp_path / "cut.onnx"
    lengths = [*range(200), *range(200, len(data), 37), *range(len(data) - 40, len(data))]
    refused = 0
    for length in lengths:
        path.write_bytes(data[:length])
        try:
            load(path)
        except fuser.InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 0.98 * len(lengths)


def test_damaged_files(tmp_path: Path) -> None:
    """Bytes changed at random: refused in a sentence, or a model."""
    data = models.decoder(1, D=8, F=12, V=4).SerializeToString()
    random = np.random.default_rng(7)
    path = tmp_path / "damaged.onnx"
    for _ in range(400):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), random.integers(1, 4)):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            fuser.fuse(path, verify=False)
        except fuser.FuserError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an ONNX model"),
        (b"not a model at all, but some text\n" * 9, "is not an ONNX file"),
        (bytes(range(256)) * 8, "is not an ONNX file"),
        (b"\0" * 4096, "is not an ONNX file"),
        (TensorProto(name="x", data_type=1, dims=[1], raw_data=b"\0" * 4).SerializeToString(), "is not an ONNX"),
    ],
)
def test_files_that_are_no_models(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(fuser.InputError, match=message):
        load(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(fuser.InputError, match="does not exist"):
        load(tmp_path / "missing.onnx")
    with pytest.raises(fuser.InputError, match="is a directory"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(fuser.InputError, match="is not a regular file"):
        load(tmp_path / "pipe.onnx")
    with pytest.raises(fuser.InputError, match="is not a regular file"):
        load("/dev/zero")
    (tmp_path / "huge.onnx").touch()
    os.truncate(tmp_path / "huge.onnx", 3 << 30)
    with pytest.raises(fuser.InputError, match="more than the 2 GiB"):
        load(tmp_path / "huge.onnx")
    with pytest.raises(fuser.InputError):
        load(tmp_path / ("n" * 300))


# External data


def external(tmp_path: Path) -> tuple[Path, ModelProto, Path]:
    """A model in a folder of its own, as a proto to be changed, and its data."""
    folder = tmp_path / "folder"
    folder.mkdir()
    data = models.save_external(models.norms(), folder / "m.onnx")
    return folder / "m.onnx", onnx.load(folder / "m.onnx", load_external_data=False), data


def test_external_data(tmp_path: Path) -> None:
    path, _, _ = external(tmp_path)
    fused = fuser.fuse(path)
    assert fused.report.fused == models.NORMS
    assert fused.report.verification.passed and not fused.report.verification.skipped


def test_external_data_in_a_folder_below(tmp_path: Path) -> None:
    path, model, data = external(tmp_path)
    (path.parent / "below").mkdir()
    data.rename(path.parent / "below" / "data")
    for weight in model.graph.initializer:
        models.entry(weight, "location").value = "below/data"
    onnx.save(model, path)
    assert not fuser.fuse(path).report.verification.skipped


def refusal(path: Path, model: ModelProto | None = None) -> str:
    if model is not None:
        path.write_bytes(model.SerializeToString())
    with pytest.raises(fuser.InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    path, model, data = external(tmp_path)
    size = data.stat().st_size
    os.truncate(data, size - 1)
    assert f"has only {size - 1} bytes" in refusal(path)
    data.unlink()
    assert "'weights.bin' is missing" in refusal(path)
    data.mkdir()
    assert "'weights.bin' is missing" in refusal(path)
    for weight in model.graph.initializer:
        models.entry(weight, "location").value = ""
    assert "lies outside" in refusal(path, model)


def test_external_data_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, data = external(tmp_path)
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file) != data)
    assert "cannot be read" in refusal(path)


def test_external_data_that_shrinks_after_it_was_found(tmp_path: Path) -> None:
    path, _, data = external(tmp_path)
    fused = fuser.fuse(path, verify=False)
    graph = load(path)
    os.truncate(data, 3)
    with pytest.raises(fuser.InputError, match=r"weights\.bin"):
        export(graph, "ort", {})
    data.unlink()
    with pytest.raises(fuser.InputError, match=r"weights\.bin"):
        export(graph, "ort", {})
    assert fused.report.fused == models.NORMS


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "-8", "lies at -8"),
        ("offset", "100000000", "has only"),
        ("offset", "9" * 30, "has only"),
        ("offset", "eight", "not a number"),
        ("offset", "0x10", "not a number"),
        ("length", "-96", "needs 96"),
        ("length", "95", "needs 96"),
        ("length", "9" * 30, "needs 96"),
        ("length", "9" * 5000, "not a number"),
        ("length", "", "not a number"),
        ("location", "../secret", "lies outside"),
        ("location", "below/../../secret", "lies outside"),
        ("location", "/etc/passwd", "lies outside"),
        ("location", "we\0ird", "missing"),
        ("location", "n" * 300, "missing"),
        ("location", "weights.bin/x", "missing"),
        ("location", ".", "missing"),
    ],
)
def test_external_data_refused(key: str, value: str, message: str, tmp_path: Path) -> None:
    path, model, _ = external(tmp_path)
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    models.entry(model.graph.initializer[0], key).value = value
    assert message in refusal(path, model)


def test_external_data_of_a_huge_shape(tmp_path: Path) -> None:
    path, model, _ = external(tmp_path)
    weight = model.graph.initializer[0]
    weight.dims[:] = [2**62, 2**62]
    models.entry(weight, "length").value = str(2**126)
    assert "has only" in refusal(path, model)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    path, _, data = external(tmp_path)
    outside = tmp_path / "outside.bin"
    data.rename(outside)
    data.symlink_to(outside)
    assert "link out of" in refusal(path)
    data.unlink()
    data.symlink_to(data.name)  # to itself
    assert "missing" in refusal(path)


def test_a_folder_of_links_as_download_caches_have(tmp_path: Path) -> None:
    path, _, data = external(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (path, data):
        (snapshot / file.name).symlink_to(file)
    assert fuser.fuse(snapshot / path.name, verify=False).report.fused == models.NORMS


def test_overlapping_external_data(tmp_path: Path) -> None:
    """Tensors may share bytes (tied weights do); each reads its own range."""
    path, model, _ = external(tmp_path)
    weights = {w.name: w for w in model.graph.initializer}
    offset = int(models.entry(weights["w"], "offset").value)
    models.entry(weights["gamma"], "offset").value = str(offset)
    models.entry(weights["scale"], "offset").value = str(offset + 4)
    path.write_bytes(model.SerializeToString())
    fused = fuser.fuse(path)
    assert fused.report.verification.passed and not fused.report.verification.skipped
    written = {w.name: numpy_helper.to_array(w) for w in fused._artifact.model.graph.initializer}
    np.testing.assert_array_equal(written["gamma"][1:], written["scale"][:-1])


def test_tied_weights_are_written_once() -> None:
    text = "(float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }"
    model = one(text, {"w": models.random(64, 64)})
    result = same(model, {"x": models.random(2, 64)})
    assert len(result.graph.initializer) == 1


# Dims


def test_freezing_dims(tmp_path: Path) -> None:
    path = zoo.exported("llama", "torchscript")
    free, frozen = fuser.fuse(path), fuser.fuse(path, dims={"batch": 1, "sequence": 1}, target="functions")
    assert frozen.report.fused == free.report.fused
    assert not frozen.report.verification.skipped
    model = frozen._artifact.model
    onnx.checker.check_model(model, full_check=True)
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes["input_ids"] == [1, 1]
    assert shapes["attention_mask"] == [1, "total"]
    feeds = zoo.cases(path)["decode"]
    names = [o.name for o in model.graph.output]
    actual = dict(zip(names, models.run(model, feeds), strict=True))
    assert zoo.relative_error(actual, zoo.run(path, feeds)) < 2e-5


def test_unknown_dims_list_the_known() -> None:
    with pytest.raises(fuser.UsageError, match=r"--dim btach=1: .* \(named dims: batch, sequence\)"):
        fuser.fuse(models.norms(), dims={"btach": 1})
    with pytest.raises(fuser.UsageError, match=r"\(named dims: none\)"):
        fuser.fuse(one("(float[2] x) => (float[2] y) { y = Relu(x) }"), dims={"batch": 1})
    with pytest.raises(fuser.UsageError, match="cannot be negative"):
        fuser.fuse(models.norms(), dims={"batch": -1})
    with pytest.raises(fuser.UsageError, match="too large"):
        fuser.fuse(models.norms(), dims={"batch": 2**63})


def test_declared_dims_are_the_same_by_name() -> None:
    graph: Graph = from_proto(one("(float[N, 3] x, float[N, 3] y) => (float[N, 3] z) { z = Add(x, y) }"), Path())
    x, y = graph.inputs
    assert x.shape == y.shape and len(graph.dim_sources) == 1


# Graphs that ONNX Runtime's own tool has fused


def test_runtime_fused_graphs_are_read_and_fused(tmp_path: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    source = zoo.exported("gpt2", "torchscript")
    optimizer.optimize_model(str(source), "gpt2", num_heads=zoo.H, hidden_size=zoo.D).save_model_to_file(
        str(tmp_path / "gpt2.onnx")
    )
    contributed = {n.op_type for n in onnx.load(tmp_path / "gpt2.onnx").graph.node if n.domain == "com.microsoft"}
    assert contributed
    for target in ("ort", "functions"):
        fused = fuser.fuse(tmp_path / "gpt2.onnx", target=target)
        assert fused.report.fused["qkv_linear"] == 2
        assert fused.report.fused["skip_layer_norm"] >= 3  # those without a bias of their own
        assert fused.report.verification.passed and not fused.report.verification.skipped


def test_results_without_a_number_prove_nothing() -> None:
    model = one(
        "(float[N, M] x) => (float[N, M] y) { g = Sigmoid(x) s = Mul(x, g) y = Mul(s, k) }",
        {"k": np.full(1, np.nan, np.float32)},
    )
    verification = fuser.fuse(model).report.verification
    assert verification.to_json()["status"] == "skipped" and "no finite number" in verification.skipped
