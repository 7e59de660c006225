"""The operator table on every node test that the onnx package carries: computed, or declined by name, and never wrong.

docs/operators.md is the table of what was measured; `pytest tests/test_node_cases.py --update-golden` writes it.
"""

import importlib.metadata
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.backend.test.loader import load_model_tests

from fuser import operators
from fuser.constants import Constant
from fuser.errors import FuserError, UnsupportedOperator
from fuser.onnx_nodes import read_attribute
from fuser.tensors import to_array, to_tensor

DOCUMENT = Path(__file__).parents[1] / "docs" / "operators.md"
VERSION = importlib.metadata.version("onnx")
FOREIGN = "sequences and optional values are no tensors"
SPELLED = "(operators spelled in others)"
HALF = ("float16", "bfloat16")


@cache
def _outcomes() -> dict[str, tuple[str, str, str]]:
    """Of each case by name: its operator, `pass`, `fail` or `declined`, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        return {case.name: (_operator(case), *_outcome(case)) for case in load_model_tests(kind="node")}


def _operator(case: Any) -> str:
    """What a case tests; one that spells an operator in others counts as those together."""
    nodes = case.model.graph.node
    if "_expanded" in case.name:
        return SPELLED
    domain = nodes[0].domain
    return f"{domain}.{nodes[0].op_type}" if domain not in ("", "ai.onnx") else str(nodes[0].op_type)


def _outcome(case: Any) -> tuple[str, str]:
    for inputs, expected in case.data_sets:
        try:
            actual = _run(case.model, inputs)
        except UnsupportedOperator as reason:
            return "declined", str(reason)
        except FuserError as reason:
            return "fail", f"refused: {reason}"
        for index, (array, tensor) in enumerate(zip(expected, actual, strict=True)):
            reason = _difference(_array(array), tensor, case.rtol, case.atol)
            if reason and not _is_nearer(case, inputs, index, _array(array), tensor):
                return "fail", f"output {index}: {reason}"
    return "pass", ""


def _run(
    model: onnx.ModelProto, inputs: Sequence[Any], float_dtype: torch.dtype | None = None
) -> list[torch.Tensor | None]:
    """The graph's outputs, node by node; with `float_dtype`, all floating types are that one.

    Raises:
        UnsupportedOperator: a node, or a type, that is outside the table.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if len(model.graph.input) < len(inputs) or any(isinstance(array, (list, type(None))) for array in inputs):
        raise UnsupportedOperator(FOREIGN)
    values: dict[str, torch.Tensor | None] = {"": None}
    for tensor in model.graph.initializer:
        values[tensor.name] = to_tensor(onnx.numpy_helper.to_array(tensor))
    for info, array in zip(model.graph.input, inputs, strict=False):
        tensor = to_tensor(_array(array))
        values[info.name] = tensor.to(float_dtype) if float_dtype and tensor.is_floating_point() else tensor
    for node in model.graph.node:
        attributes: dict[str, Any] = {}
        for attribute in node.attribute:
            value = read_attribute(attribute)
            if value is None and attribute.type not in (onnx.AttributeProto.FLOATS, onnx.AttributeProto.INTS):
                raise UnsupportedOperator(f"{node.op_type}: carries {attribute.name}")
            value = [] if value is None else list(value) if isinstance(value, tuple) else value
            attributes[attribute.name] = to_tensor(value.numpy()) if isinstance(value, Constant) else value
        given = [values[name] for name in node.input]
        found = operators.evaluate(
            node.op_type, node.domain, attributes, given, outputs=len(node.output), opset=opset, float_dtype=float_dtype
        )
        values.update(zip(node.output, found, strict=True))
    return [values[info.name] for info in model.graph.output]


def _array(item: Any) -> Any:
    """Inputs and outputs come as arrays, and those of types that numpy lacks in protobufs."""
    return onnx.numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else np.asarray(item)


def _difference(expected: Any, actual: torch.Tensor | None, rtol: float, atol: float) -> str:
    """How an output differs from the one that is wanted; empty where it does not."""
    if actual is None:
        return "absent"
    array = to_array(actual)
    if array.dtype != expected.dtype or array.shape != expected.shape:
        return f"{array.dtype}{list(array.shape)}, wanted {expected.dtype}{list(expected.shape)}"
    if not np.issubdtype(array.dtype, np.number) or array.dtype.itemsize < 4:
        array, expected = array.astype(np.float64), expected.astype(np.float64)
    if np.allclose(array, expected, rtol, atol, equal_nan=True):
        return ""
    return f"off by {np.nanmax(np.abs(array.astype(np.float64) - expected.astype(np.float64))):.1e}"


def _is_nearer(case: Any, inputs: Sequence[Any], index: int, expected: Any, actual: torch.Tensor | None) -> bool:
    """Whether an output in float16 or bfloat16 is nearer to what float64 gives than the one that is wanted.

    The cases round between two steps, and their tolerance is finer than such a type.
    """
    if actual is None or expected.dtype.name not in HALF or tuple(actual.shape) != expected.shape:
        return False
    exact = _run(case.model, inputs, torch.float64)[index]
    assert exact is not None
    ours, theirs = actual.double(), to_tensor(expected).double()
    return bool((ours - exact).norm() <= (theirs - exact).norm())


@cache
def _counts() -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome, _ in _outcomes().values():
        found[name][outcome] += 1
    return dict(sorted(found.items()))


def test_none_is_wrong() -> None:
    wrong = [f"{name}: {reason}" for name, (_, outcome, reason) in _outcomes().items() if outcome == "fail"]
    assert not wrong, f"{len(wrong)} are wrong\n" + "\n".join(wrong)


def test_what_is_declined_is_named() -> None:
    for name, (operator, outcome, reason) in _outcomes().items():
        if outcome == "declined" and reason != FOREIGN:
            kind = operator.rpartition(".")[2]
            assert operator == SPELLED or kind in reason or "cannot be computed with" in reason, f"{name}: {reason}"


HEADER = f"""\
# Operators

The node tests of onnx {VERSION} on the operator table (`fuser/operators/`): how many of each operator's tests compute what is
wanted, and how many are declined by name. None computes anything else. `pytest tests/test_node_cases.py --update-golden`
writes this.

| operator | pass | declined |
|---|---:|---:|
"""


def _documented() -> dict[str, str]:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines() if DOCUMENT.exists() else []
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and not line.startswith("| op")}


def test_document(update_golden: bool) -> None:
    """The table is what was measured; with another version of onnx, which has other tests, no operator is lost."""
    counts = _counts()
    rows = {name: f"| {name} | {count['pass']} | {count['declined']} |" for name, count in counts.items()}
    if update_golden:
        DOCUMENT.write_text(HEADER + "\n".join(rows.values()) + "\n", encoding="utf-8")
    documented = _documented()
    if DOCUMENT.read_text(encoding="utf-8").startswith(HEADER):
        assert documented == rows
    computed = {name for name, row in documented.items() if int(row.split("|")[2])}
    assert not {name for name in computed & counts.keys() if not counts[name]["pass"]}
