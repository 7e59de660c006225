"""The operator table against ONNX's own node tests and schemas, against ONNX Runtime, and in float64."""

import collections
import fnmatch
import inspect
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.backend.test.loader import load_model_tests
from torch import Tensor

from fuser.errors import FuserError, UnsupportedOperator
from fuser.operators import evaluate, supported
from fuser.operators.creation import tensor_of
from fuser.operators.table import TABLE

# Node tests, by reason, of operators in the table that need a form it refuses. One that runs all the same is held.
DECLINED = {
    "no dtype for float8": ("*FLOAT8E*", "*_float8e*", "*_e4m3fn*", "*_e5m2*"),
    "no dtype for float4, int4, uint4, int2, uint2": (
        "*FLOAT4E2M1*",
        "*_float4e2m1",
        "*INT4*",
        "*INT2*",
        "*_int[24]",
        "*_uint[24]",
    ),
    "no strings": ("*_string", "*_string_*", "*STRING*"),
    "training: what Dropout drops is random": ("test_training_dropout*",),
}

# Node tests that hold older semantics: up to onnx 1.21, Attention's qk_matmul_output modes 1 and 2 were exchanged and
# the L2 normalization of a zero vector was NaN. ONNX Runtime has today's modes.
SUPERSEDED = ("test_attention_*_qk_matmul_bias*", "test_attention_*_qk_matmul_softcap", "test_l2normalization_axis_0")

# Norm-wise relative error allowed against ONNX's reference values: a few units in the last place, as the reference
# rounds at every step and the table once.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def error_of(got: Tensor | None, wanted: Tensor | None, tolerance: float | None = None) -> str:
    """What is wrong with `got`: dtype, shape, non-finite values, integers, the norm of the difference; else empty."""
    if got is None or wanted is None:
        return "" if got is wanted else f"{got} instead of {wanted}"
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{got.dtype}{list(got.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
    if not got.dtype.is_floating_point:
        return "" if torch.equal(got, wanted) else "values differ"
    finite = wanted.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return "not finite where the other is"
    if not torch.allclose(got[~finite], wanted[~finite], equal_nan=True):
        return "another infinity or NaN"
    difference, norm = (got.double() - wanted.double())[finite].norm(), wanted.double()[finite].norm()
    limit = TOLERANCE[got.dtype] if tolerance is None else tolerance
    return "" if difference <= limit * norm else f"relative error {float(difference / norm):.1e}, allowed {limit:.1e}"


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode()
        return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value

    return {a.name: plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}


def run_graph(model: onnx.ModelProto, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Evaluates the nodes in the order they are written."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    values: dict[str, Tensor | None] = {"": None}
    values |= {x.name: tensor_of(onnx.numpy_helper.to_array(x)) for x in model.graph.initializer}
    values |= {x.name: value for x, value in zip(model.graph.input, inputs, strict=True)}
    for node in model.graph.node:
        results = evaluate(
            node.op_type,
            node.domain,
            attributes_of(node),
            [values[name] for name in node.input],
            outputs=len(node.output),
            opset=opsets[node.domain],
        )
        values |= dict(zip(node.output, results, strict=True))
    return [values[x.name] for x in model.graph.output]


def node_test_cases() -> Iterator[tuple[str, onnx.ModelProto, list[tuple[list[Any], list[Any]]]]]:
    """(name, model, data sets) of every node test the onnx package carries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        cases = load_model_tests(kind="node")
    for case in cases:
        if case.model is not None:
            yield case.name, case.model, case.data_sets
        else:  # before onnx 1.20 or so the cases lie in files
            folder = Path(case.model_dir)
            model = onnx.load(folder / "model.onnx")
            yield (
                case.name,
                model,
                [(tensors(d, "input"), tensors(d, "output")) for d in folder.glob("test_data_set_*")],
            )


def tensors(folder: Path, stem: str) -> list[onnx.TensorProto]:
    """The tensors input_0.pb, input_1.pb, ... of a data set."""
    count = len(list(folder.glob(f"{stem}_*.pb")))
    return [onnx.TensorProto.FromString((folder / f"{stem}_{i}.pb").read_bytes()) for i in range(count)]


def from_onnx(value: Any) -> Tensor | None:
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    return None if value is None else tensor_of(value)


def outcome(name: str, model: onnx.ModelProto, data_sets: list[tuple[list[Any], list[Any]]]) -> tuple[str, str]:
    """("passed" | "failed" | "declined", why)."""
    reason = next((why for why, globs in DECLINED.items() if any(fnmatch.fnmatchcase(name, g) for g in globs)), None)
    try:
        for inputs, wanted in data_sets:
            results = run_graph(model, [from_onnx(x) for x in inputs])
            for result, expected in zip(results, wanted, strict=True):
                if wrong := error_of(result, from_onnx(expected)):
                    return "failed", f"{name}: {wrong}"
    except UnsupportedOperator as error:
        return ("declined", reason) if reason else ("failed", f"{name}: refused, and not listed as declined: {error}")
    except FuserError as error:
        return "failed", f"{name}: {error}"
    return "passed", ""


def test_onnx_node_tests() -> None:
    """Every node test whose operators are all in the table passes, or is refused and listed as declined."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures = []
    older = tuple(int(number) for number in onnx.__version__.split(".")[:2]) < (1, 22)
    for name, model, data_sets in node_test_cases():
        operators = [(node.domain, node.op_type) for node in model.graph.node]
        tensors_only = all(x.type.HasField("tensor_type") for x in (*model.graph.input, *model.graph.output))
        if model.functions or not tensors_only or not all(supported(op, domain) for domain, op in operators):
            continue
        if older and any(fnmatch.fnmatchcase(name, glob) for glob in SUPERSEDED):
            continue
        status, why = outcome(name, model, data_sets)
        label = operators[0][1] if len(operators) == 1 else "(several nodes)"
        counts[label][status] += 1
        if status == "failed":
            failures.append(why)
    for label, count in sorted(counts.items()):
        print(f"{label}: {count['passed']} passed, {count['failed']} failed, {count['declined']} declined")
    total = sum(counts.values(), collections.Counter())
    print(f"all: {total['passed']} passed, {total['failed']} failed, {total['declined']} declined")
    assert not failures, "\n".join(failures)
    assert total["passed"] > 1000  # the loader found the cases, and the table is not a shell


def test_attributes_and_defaults_are_the_schemas() -> None:
    """Every row takes every attribute of its newest schema, with the schema's default.

    The softmax family's axis is None by default, standing for -1, or 1 before opset 13.
    """
    by_opset = {(op, "axis") for op in ("Softmax", "LogSoftmax", "Hardmax")}
    refused = {"Constant": {"sparse_value", "value_string", "value_strings"}}
    wrong = []
    for (domain, op), row in TABLE.items():
        if domain or not onnx.defs.has(op):
            continue
        parameters = inspect.signature(row.compute).parameters
        schema = onnx.defs.get_schema(op)
        for name, attribute in schema.attributes.items():
            if name in refused.get(op, ()) or name in row.inputs or (op, name) in by_opset:
                continue
            if name not in row.attributes:
                wrong.append(f"{op}: {name} missing")
                continue
            default = attributes_of(onnx.NodeProto(attribute=[attribute.default_value])).get(name)
            found = parameters[name].default
            absent = (None, "", inspect.Parameter.empty, 0)
            if found != default and not (default is None and found in absent):
                wrong.append(f"{op}: {name} is {default} by default, here {found}")
    assert not wrong, "\n".join(wrong)


def onnx_runtime(
    op: str,
    domain: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[Tensor | None],
    outputs: Sequence[bool],
    opset: int,
) -> list[Tensor]:
    """The outputs that are wanted (True), from ONNX Runtime on the CPU."""
    codes = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.int32: 6}
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    results = [f"y{i}" if wanted else "" for i, wanted in enumerate(outputs)]
    node = onnx.helper.make_node(op, names, results, domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        op,
        [
            onnx.helper.make_tensor_value_info(f"x{i}", codes[x.dtype], x.shape)
            for i, x in enumerate(inputs)
            if x is not None
        ],
        [onnx.ValueInfoProto(name=name) for name in results if name],
    )
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=imports)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {f"x{i}": x.numpy() for i, x in enumerate(inputs) if x is not None}
    return [torch.from_numpy(np.asarray(y)) for y in session.run(None, feeds)]


def hold_against_onnx_runtime(
    op: str,
    domain: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[Tensor | None],
    outputs: Sequence[bool] = (True,),
    opset: int = 17,
    tolerance: float | None = None,
) -> None:
    wanted = onnx_runtime(op, domain, attributes, inputs, outputs, opset)
    got = evaluate(op, domain, attributes, inputs, outputs=len(outputs), opset=opset)
    for result, expected in zip(itertools.compress(got, outputs), wanted, strict=True):
        assert error_of(result, expected, tolerance) == ""


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


# (operator, attributes, inputs, opset): operators as they were when the parameter was still an attribute.
OLD_FORMS: list[tuple[str, dict[str, Any], list[Tensor], int]] = [
    ("ReduceSum", {"axes": [-1], "keepdims": 0}, [normal(2, 3, 5)], 11),
    ("ReduceMean", {"axes": [0, 2]}, [normal(2, 3, 5)], 13),
    ("ReduceMax", {}, [normal(2, 3, 5)], 13),
    ("Squeeze", {"axes": [1]}, [normal(2, 1, 5, 1)], 11),
    ("Squeeze", {}, [normal(2, 1, 5, 1)], 11),
    ("Unsqueeze", {"axes": [0, 3]}, [normal(2, 5)], 11),
    ("Slice", {"starts": [1, -4], "ends": [9, -1], "axes": [0, 1]}, [normal(3, 7)], 9),
    ("Slice", {"starts": [1], "ends": [2]}, [normal(3, 7)], 9),
    ("Split", {"split": [1, 4, 2], "axis": 1}, [normal(3, 7)], 11),
    ("Clip", {"min": -0.5, "max": 0.25}, [normal(3, 7)], 10),
    ("Clip", {"max": 0.25}, [normal(3, 7)], 10),
    ("Pad", {"pads": [1, 0, 2, 3], "value": 0.5}, [normal(3, 7)], 10),
    ("TopK", {"k": 3, "axis": 0}, [normal(7, 3)], 9),
    ("Dropout", {"ratio": 0.4}, [normal(3, 7)], 11),
    ("Softmax", {}, [normal(2, 3, 5)], 11),
    ("Softmax", {"axis": 0}, [normal(2, 3, 5)], 11),
    ("LogSoftmax", {"axis": -1}, [normal(2, 3, 5)], 11),
    ("GroupNormalization", {"num_groups": 2}, [normal(2, 6, 5), normal(2), normal(2) + 1], 18),
]


@pytest.mark.parametrize(("op", "attributes", "inputs", "opset"), OLD_FORMS, ids=[f"{c[0]}-{c[3]}" for c in OLD_FORMS])
def test_forms_of_older_opsets(op: str, attributes: dict[str, Any], inputs: list[Tensor], opset: int) -> None:
    outputs = {"Split": 3, "TopK": 2}.get(op, 1)
    hold_against_onnx_runtime(op, "", attributes, inputs, [True] * outputs, opset)


# (operator, attributes, inputs): what the node tests leave open.
CURRENT_FORMS: list[tuple[str, dict[str, Any], list[Tensor]]] = [
    ("TopK", {}, [(10 * normal(40, 50)).round(), torch.tensor([30])]),  # ties
    ("TopK", {"largest": 0, "axis": 0}, [(10 * normal(40, 50)).round(), torch.tensor([30])]),
    ("ArgMax", {"axis": 1}, [(2 * normal(40, 50)).round()]),
    ("Pow", {}, [torch.tensor([2**24 + 1, -3], dtype=torch.int32), torch.tensor([1.0, 3.0])]),
    ("Pow", {}, [normal(3).abs(), torch.tensor([2, 0, -1])]),
    ("Mod", {}, [torch.tensor([-7, 7, -7, 6]), torch.tensor([3, -3, -3, 3])]),
    ("Div", {}, [torch.tensor([-7, 7, -7, 6]), torch.tensor([3, -3, -3, 3])]),
    ("ReduceMean", {"axes": [0]}, [torch.tensor([[-3, 4], [-4, 5]], dtype=torch.int32)]),
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, [normal(2, 4, 8, 9), normal(6, 4, 3, 4)]),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 3]}, [normal(2, 4, 8, 9), normal(6, 4, 3, 4), normal(6)]),
    ("Conv", {"auto_pad": "VALID", "group": 2}, [normal(2, 4, 9), normal(6, 2, 3)]),
    ("Conv", {"pads": [3, 0], "dilations": [2]}, [normal(2, 4, 9), normal(6, 4, 3)]),
    ("Sign", {}, [torch.tensor([torch.nan, -torch.inf, -0.0, 2.0])]),
    ("Relu", {}, [torch.tensor([torch.nan, -torch.inf, -0.0, 2.0])]),
    ("Max", {}, [torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, torch.nan])]),
    ("Gather", {"axis": -2}, [normal(2, 5, 3), torch.tensor([[0, -1], [-5, 4]])]),
    ("OneHot", {"axis": 1}, [torch.tensor([[0, -1, 7], [2, 1, -4]]), torch.tensor(3), torch.tensor([0.5, 2.0])]),
    ("Einsum", {"equation": "bhsd, bhtd -> bhst"}, [normal(2, 3, 4, 5), normal(2, 3, 6, 5)]),
]


@pytest.mark.parametrize(("op", "attributes", "inputs"), CURRENT_FORMS, ids=[c[0] for c in CURRENT_FORMS])
def test_against_onnx_runtime(op: str, attributes: dict[str, Any], inputs: list[Tensor]) -> None:
    hold_against_onnx_runtime(op, "", attributes, inputs, [True] * {"TopK": 2}.get(op, 1))


CONTRIB: list[tuple[str, dict[str, Any], list[Tensor | None], list[bool]]] = [
    ("SkipLayerNormalization", {}, [normal(2, 3, 13), normal(2, 3, 13), normal(13), normal(13)], [True]),
    (
        "SkipLayerNormalization",
        {"epsilon": 1e-3},
        [normal(2, 3, 13), normal(2, 3, 13), normal(13), None, normal(13)],
        [True, False, False, True],
    ),
    ("SkipLayerNormalization", {}, [normal(2, 3, 13), normal(3, 13), normal(13)], [True, False, False, True]),
    ("SkipLayerNormalization", {}, [normal(2, 3, 13), normal(1, 3, 13), normal(13)], [True]),
    ("SkipSimplifiedLayerNormalization", {}, [normal(2, 3, 13), normal(2, 3, 13), normal(13)], [True]),
    (
        "SkipSimplifiedLayerNormalization",
        {"epsilon": 1e-3},
        [normal(2, 3, 13), normal(2, 3, 13), normal(13), normal(13)],
        [True, False, False, True],
    ),
    ("QuickGelu", {}, [normal(3, 7)], [True]),
    ("QuickGelu", {"alpha": 1.0}, [normal(3, 7)], [True]),
    ("Gelu", {}, [normal(3, 7)], [True]),
    ("FastGelu", {}, [normal(3, 7)], [True]),
    ("FastGelu", {}, [normal(3, 7), normal(7)], [True]),
    ("BiasGelu", {}, [normal(3, 7), normal(7)], [True]),
    ("FusedMatMul", {"alpha": 0.3}, [normal(2, 3, 5), normal(5, 7)], [True]),
    ("FusedMatMul", {"transA": 1, "transB": 1}, [normal(2, 5, 3), normal(2, 7, 5)], [True]),
    ("FusedMatMul", {"transBatchA": 1, "transBatchB": 1}, [normal(3, 2, 5), normal(5, 2, 7)], [True]),
    ("FusedMatMul", {"transBatchA": 1, "transA": 1}, [normal(5, 2, 3), normal(2, 5, 7)], [True]),
    ("FusedMatMul", {"transBatchA": 1}, [normal(3, 2, 4, 5), normal(2, 4, 5, 7)], [True]),
]


@pytest.mark.parametrize(("op", "attributes", "inputs", "outputs"), CONTRIB, ids=[c[0] for c in CONTRIB])
def test_contrib(op: str, attributes: dict[str, Any], inputs: list[Tensor | None], outputs: list[bool]) -> None:
    hold_against_onnx_runtime(op, "com.microsoft", attributes, inputs, outputs)


@pytest.mark.parametrize("axis", [-1, 1])
def test_simplified_layer_normalization(axis: int) -> None:
    x, scale = normal(2, 3, 13), normal(*(2, 3, 13)[axis:])
    attributes = {"axis": axis, "epsilon": 1e-3, "stash_type": 1}
    hold_against_onnx_runtime("SimplifiedLayerNormalization", "", attributes, [x, scale], [True, True])


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_contrib_in_float16(op: str) -> None:
    x, skip, gamma = (normal(*shape, dtype=torch.float16) for shape in ((2, 3, 64), (2, 3, 64), (64,)))
    hold_against_onnx_runtime(op, "com.microsoft", {}, [x, skip, gamma], [True, False, False, True])


def one(op: str, *inputs: Tensor | None, domain: str = "", **attributes: Any) -> Tensor:
    """The only output, of float64 evaluation."""
    (result,) = evaluate(op, domain, attributes, inputs, float_dtype=torch.float64)
    assert result is not None
    return result


def test_float16_region_in_float64() -> None:
    """An exported float16 RMS norm: casts, a float32 epsilon, a float16 weight; fed float64 it never rounds below."""
    x, weight = normal(2, 3, 64).double(), normal(64).double()
    wide = one("Cast", x, to=1)
    mean = one("ReduceMean", one("Pow", wide, one("Constant", value=np.float32(2))), axes=[-1])
    root = one("Sqrt", one("Add", mean, one("Constant", value_float=1e-6)))
    normed = one("Cast", one("Mul", wide, one("Reciprocal", root)), to=10)
    y = one("Mul", normed, weight)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert error_of(y, exact, 1e-12) == ""
    assert error_of(one("RMSNormalization", x, weight, epsilon=1e-6), exact, 1e-12) == ""


@pytest.mark.parametrize(
    ("op", "domain", "inputs", "attributes", "dtypes"),
    [
        ("Cast", "", [normal(3)], {"to": 10}, [torch.float64]),
        ("Cast", "", [normal(3)], {"to": 7}, [torch.int64]),
        ("Cast", "", [normal(3)], {"to": 9}, [torch.bool]),
        ("CastLike", "", [normal(3), torch.ones(1, dtype=torch.float16)], {}, [torch.float64]),
        ("Constant", "", [], {"value": np.float16(0.1)}, [torch.float64]),
        ("Constant", "", [], {"value": np.int32(3)}, [torch.int32]),
        ("Constant", "", [], {"value_floats": [0.1]}, [torch.float64]),
        ("ConstantOfShape", "", [torch.tensor([2])], {}, [torch.float64]),
        ("ConstantOfShape", "", [torch.tensor([2])], {"value": torch.tensor([1])}, [torch.int64]),
        ("EyeLike", "", [normal(3, 3)], {"dtype": 1}, [torch.float64]),
        ("Range", "", [torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.1)], {}, [torch.float64]),
        ("Range", "", [torch.tensor(0), torch.tensor(5), torch.tensor(2)], {}, [torch.int64]),
        ("LayerNormalization", "", [normal(2, 4).double(), normal(4).double()], {}, [torch.float64] * 3),
        (
            "SkipLayerNormalization",
            "com.microsoft",
            [normal(2, 4).double(), normal(2, 4).double(), normal(4).double()],
            {},
            [torch.float64] * 4,
        ),
    ],
)
def test_float_dtype_is_what_an_operator_chooses(
    op: str, domain: str, inputs: list[Tensor], attributes: dict[str, Any], dtypes: list[torch.dtype]
) -> None:
    results = evaluate(op, domain, attributes, inputs, outputs=len(dtypes), float_dtype=torch.float64)
    assert [None if y is None else y.dtype for y in results] == dtypes


def test_attention_in_float64() -> None:
    """Grouped heads, a past, a causal mask and float32 softmax_precision, against torch in float64."""
    q, k, v = normal(2, 6, 3, 8).double(), normal(2, 2, 3, 8).double(), normal(2, 2, 3, 5).double()
    past_k, past_v = normal(2, 2, 4, 8).double(), normal(2, 2, 4, 5).double()
    y = one("Attention", q, k, v, None, past_k, past_v, is_causal=1, softmax_precision=1)
    visible = torch.ones(3, 7, dtype=torch.bool).tril(4)
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    exact = torch.nn.functional.scaled_dot_product_attention(q, keys, values, visible, enable_gqa=True)
    assert error_of(y, exact, 1e-14) == ""


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_hides_what_a_shorter_mask_does_not_reach(dtype: torch.dtype) -> None:
    q, k, v, mask = normal(2, 2, 3, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 5), normal(3, 4).to(dtype)
    (y,) = evaluate("Attention", "", {}, [q, k, v, mask])
    (wanted,) = evaluate("Attention", "", {}, [q, k[:, :, :4], v[:, :, :4], mask])
    assert error_of(y, wanted) == ""


def test_rms_normalization_has_the_dtype_of_its_scale() -> None:
    x, scale = normal(2, 64, dtype=torch.float16), normal(64)
    (y,) = evaluate("RMSNormalization", "", {}, [x, scale])
    (wanted,) = evaluate("RMSNormalization", "", {}, [x.float(), scale])
    assert error_of(y, wanted) == ""


def test_integer_roots_and_logarithms_pass_through_float64() -> None:
    x = torch.tensor([[2**40, 2**31]])  # the sum of squares is exact in int64 and not in float32
    (root,) = evaluate("ReduceL2", "", {"keepdims": 0}, [torch.tensor([2**30 + 1])])
    assert error_of(root, torch.tensor(2**30 + 1)) == ""
    (logarithm,) = evaluate("ReduceLogSumExp", "", {"keepdims": 0}, [x])
    assert error_of(logarithm, torch.tensor(2**40)) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """The result is the float32 one, rounded: no step inside rounds to, or overflows, the half dtype."""
    x, w, scale = normal(3, 512, dtype=dtype), normal(512, 5, dtype=dtype), normal(512, dtype=dtype)
    large = 300 * x  # its square overflows float16
    cases: list[tuple[str, list[Tensor], dict[str, Any]]] = [
        ("MatMul", [x, w], {}),
        ("Gemm", [x, w, normal(5, dtype=dtype)], {"alpha": 0.3}),
        ("LayerNormalization", [large, scale, scale], {}),
        ("RMSNormalization", [large, scale], {}),
        ("ReduceSum", [x, torch.tensor([1])], {}),
        ("ReduceL2", [large, torch.tensor([1])], {}),
        ("Softmax", [x], {}),
        ("CumSum", [x, torch.tensor(1)], {}),
        ("Swish", [x], {}),
        ("Gelu", [x], {"approximate": "tanh"}),
    ]
    for op, inputs, attributes in cases:
        (got,) = evaluate(op, "", attributes, inputs)
        (exact,) = evaluate(op, "", attributes, [i.float() if i.dtype == dtype else i for i in inputs])
        assert exact is not None
        assert error_of(got, exact.to(dtype), 0.0) == "", op


def test_slice_as_numpy() -> None:
    """Every sign of bound and step, past both ends."""
    x = normal(7)
    bounds = [-(2**63), -9, -7, -3, -1, 0, 2, 6, 7, 9, 2**63 - 1]
    for start, end, step in itertools.product(bounds, bounds, (-3, -1, 1, 2)):
        (got,) = evaluate("Slice", "", {"starts": [start], "ends": [end], "steps": [step]}, [x])
        assert got is not None
        np.testing.assert_array_equal(got.numpy(), x.numpy()[start:end:step])


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_pad_as_numpy(mode: str) -> None:
    """Some pads longer than the data."""
    x = normal(2, 4)
    for rows, columns in itertools.product([(0, 0), (1, 3)], [(2, 0), (9, 5)]):
        (got,) = evaluate("Pad", "", {"mode": mode, "pads": [rows[0], columns[0], rows[1], columns[1]]}, [x])
        assert got is not None
        np.testing.assert_array_equal(got.numpy(), np.pad(x.numpy(), (rows, columns), mode=mode))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("shape", "target", "wanted"),
    [
        ((2, 3, 4), [0, -1], [2, 12]),
        ((2, 0, 3, 4), [0, 0, -1], [2, 0, 12]),  # an empty past keeps its heads
        ((0, 6), [-1, 3, 2], [0, 3, 2]),
    ],
)
def test_reshape_infers_a_dim(shape: tuple[int, ...], target: list[int], wanted: list[int]) -> None:
    (got,) = evaluate("Reshape", "", {}, [torch.zeros(shape), torch.tensor(target)])
    assert got is not None
    assert list(got.shape) == wanted


@pytest.mark.parametrize(
    ("op", "attributes", "inputs", "message"),
    [
        ("Loop", {}, [], "Loop: no such operator"),
        ("Relu", {"slope": 1}, [normal(2)], "Relu: unknown attribute slope"),
        ("Cast", {"to": 8}, [normal(2)], "Cast: ONNX data type 8"),
        ("Dropout", {}, [normal(2), torch.tensor(0.5), torch.tensor(True)], "Dropout: training_mode"),
        ("Relu", {}, [normal(2), normal(2)], "Relu: takes inputs"),
    ],
)
def test_refusals(op: str, attributes: dict[str, Any], inputs: list[Tensor], message: str) -> None:
    with pytest.raises(UnsupportedOperator, match=message):
        evaluate(op, "", attributes, inputs)


@pytest.mark.parametrize(
    ("op", "attributes", "inputs", "message"),
    [
        ("MatMul", {}, [normal(2, 3), normal(2, 3)], r"MatMul: inputs \(float32\[2, 3\], float32\[2, 3\]\)"),
        ("Add", {}, [normal(2), normal(2).double()], "Add: inputs must have one dtype, got float32 and float64"),
        ("Add", {}, [normal(2)], "Add: b is required"),
        ("Cast", {}, [normal(2)], "Cast: to is required"),
        ("Gather", {}, [normal(2), torch.tensor([2])], "Gather: inputs"),
        ("GatherND", {}, [normal(2, 3), torch.tensor([[0, 3]])], "GatherND: indices must be in"),
        ("Squeeze", {"axes": [0]}, [normal(2, 3)], "Squeeze: axes"),
        ("Split", {}, [normal(3)], "Split: 3 does not split into 2 equal parts"),
        ("Reshape", {"allowzero": 1}, [torch.zeros(0, 2), torch.tensor([0, -1])], "Reshape: cannot infer the -1"),
        ("ReduceSum", {"axes": [1]}, [normal(2, 3), torch.tensor([1])], "both as an input and as an attribute"),
    ],
)
def test_misfits(op: str, attributes: dict[str, Any], inputs: list[Tensor], message: str) -> None:
    with pytest.raises(FuserError, match=message):
        evaluate(op, "", attributes, inputs, outputs=2)


def test_domains() -> None:
    assert supported("Add") and supported("Add", "ai.onnx") and not supported("Add", "com.microsoft")
    assert supported("QuickGelu", "com.microsoft") and not supported("QuickGelu")
    (y,) = evaluate("Neg", "ai.onnx", {}, [normal(3)])
    assert error_of(y, -normal(3)) == ""
