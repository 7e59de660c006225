"""Small ONNX models written as text, their weights drawn at random, and running them in ONNX Runtime.

    model = text_graphs.parse('''
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y) <float[4] w> { y = Mul(x, w) }
    ''')

The text is what `onnx.parser` reads. What `<...>` declares without a value, and no node makes, is a weight.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from numpy.typing import NDArray

from fuser.canonicalize import canonicalize
from fuser.graph import Graph
from fuser.importer import from_proto

SIZES = {"batch": 2, "seq": 3, "past": 2, "total": 5}


def parse(text: str) -> onnx.ModelProto:
    """The model a text describes, its weights filled with the same numbers each time."""
    model = onnx.parser.parse_model(text)
    made = {name for node in model.graph.node for name in node.output}
    random = np.random.RandomState(0)
    kept = []
    for info in model.graph.value_info:
        if info.name in made:
            kept.append(info)
            continue
        tensor = info.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [dim.dim_value for dim in tensor.shape.dim]
        weight = random.standard_normal(shape).astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, info.name))
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return model


def graph(text: str) -> Graph:
    """The canonical graph of a text."""
    return canonical(parse(text))


def canonical(model: onnx.ModelProto) -> Graph:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    made = from_proto(copy, Path())
    canonicalize(made)
    made.validate()
    return made


def feeds(model: onnx.ModelProto, scale: float = 1.0) -> dict[str, NDArray[Any]]:
    """Random inputs; named dims take the sizes of `SIZES`."""
    random = np.random.RandomState(1)
    made = {}
    for info in model.graph.input:
        tensor = info.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else SIZES[dim.dim_param] for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        integer = dtype.kind in "ib"
        drawn = random.randint(0, 2, shape) if integer else random.standard_normal(shape) * scale
        made[info.name] = np.asarray(drawn).astype(dtype)
    return made


def run(model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]], *, optimize: bool = True) -> list[NDArray[Any]]:
    """The outputs in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, dict(inputs))
    return outputs


def relative_error(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """||a - r|| / ||r|| in float64; infinite where shapes differ or only one of them is a number."""
    if actual.shape != reference.shape or not np.array_equal(np.isnan(actual), np.isnan(reference)):
        return float("inf")
    a, r = (np.nan_to_num(x.astype(np.float64), posinf=np.inf, neginf=-np.inf) for x in (actual, reference))
    difference, norm = float(np.linalg.norm(a - r)), float(np.linalg.norm(r))
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and np.isfinite(difference) else float("inf")
