"""The operator table against ONNX's own node tests, against ONNX Runtime's contrib operators, and in float64."""

import collections
import functools
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.loader import load_model_tests

from fuser.errors import FuserError, UnsupportedOperator
from fuser.operators import evaluate, supported
from fuser.operators.creation import tensor_of

# Node tests of operators in the table that are not held, each under the reason why.
DECLINED: dict[str, tuple[str, ...]] = {}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, onnx.TensorProto):
            return onnx.numpy_helper.to_array(value)
        return value

    return {a.name: plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}


def run(model: onnx.ModelProto, inputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Evaluates the graph node by node, in the order it is written."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    values: dict[str, torch.Tensor | None] = {"": None}
    values |= {x.name: tensor_of(onnx.numpy_helper.to_array(x)) for x in model.graph.initializer}
    values |= {x.name: value for x, value in zip(model.graph.input, inputs, strict=False)}
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


@functools.cache
def node_tests() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        return list(load_model_tests(kind="node"))


def declined_for(name: str) -> str | None:
    return next((reason for reason, names in DECLINED.items() if name in names), None)
