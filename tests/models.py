"""Small ONNX models written by hand, and running them: what the tests of the compiler's boundary share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fuser.dtypes import MAX_OPSET

Array = NDArray[Any]
Feeds = Mapping[str, Any]


def parsed(text: str, weights: Mapping[str, Array] | None = None) -> ModelProto:
    """A model in ONNX's textual syntax, with initializers."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in (weights or {}).items())
    return model


def one(body: str, weights: Mapping[str, Array] | None = None, *, opset: int = 17, more: str = "") -> ModelProto:
    """A model of one graph: `one("(float[N] x) => (float[N] y) { y = Relu(x) }")`; `more` are further opset imports."""
    return parsed(f'<ir_version: 10, opset_import: ["": {opset}{more}]> g {body}', weights)


def unshaped(model: ModelProto) -> ModelProto:
    """The model, nothing said of its outputs' shapes (`float y` alone is a scalar), those of bodies included."""
    bodies = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    for graph in (model.graph, *bodies):
        for output in graph.output:
            output.type.tensor_type.ClearField("shape")
    return model


def session(model: ModelProto | str | Path, *, optimize: bool = False) -> onnxruntime.InferenceSession:
    """ONNX Runtime on two threads, silent, by default without its own rewrites."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: ModelProto | str | Path, feeds: Feeds, *, optimize: bool = False) -> list[Any]:
    """The outputs, in order."""
    return list(session(model, optimize=optimize).run(None, dict(feeds)))


def runs(opset: int) -> bool:
    """Whether the installed ONNX Runtime knows an opset."""
    try:
        session(one("(float[N] x) => (float[N] y) { y = Relu(x) }", opset=opset))
    except Exception:  # onnxruntime's exceptions share no base but Exception
        return False
    return True


class Nodes:
    """Writes nodes one after the other: `y = nodes("Add", x, b)` gives the output's name."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.protos: list[onnx.NodeProto] = []
        self.weights: dict[str, TensorProto] = {}

    def __call__(self, op: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        stem = f"{op.lower()}_{len(self.protos)}"
        names = [stem] if outputs == 1 else [f"{stem}_{i}" for i in range(outputs)]
        self.protos.append(helper.make_node(op, inputs, names, name=name or stem, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, data: Any, dtype: Any = np.int64) -> str:
        name = f"const_{len(self.weights)}"
        self.weights[name] = numpy_helper.from_array(np.asarray(data, dtype), name)
        return name

    def mean(self, x: str) -> str:
        """ReduceMean over the last axis, as the opset spells it."""
        if self.opset < 18:
            return str(self("ReduceMean", x, axes=[-1], keepdims=1))
        return str(self("ReduceMean", x, self.const([-1]), keepdims=1))

    def rms_norm(self, x: str, weight: str, eps: float = 1e-5) -> str:
        square = self("Pow", x, self.const(2.0, np.float32))
        root = self("Sqrt", self("Add", self.mean(square), self.const(eps, np.float32)))
        return str(self("Mul", self("Div", x, root), weight))

    def layer_norm(self, x: str, weight: str, bias: str, eps: float = 1e-5) -> str:
        centered = self("Sub", x, self.mean(x))
        square = self("Pow", centered, self.const(2.0, np.float32))
        root = self("Sqrt", self("Add", self.mean(square), self.const(eps, np.float32)))
        return str(self("Add", self("Mul", self("Div", centered, root), weight), bias))

    def silu(self, x: str) -> str:
        return str(self("Mul", x, self("Sigmoid", x)))

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        weights: Sequence[TensorProto] = (),
        ir_version: int = 10,
    ) -> ModelProto:
        graph = helper.make_graph(self.protos, "g", inputs, outputs, [*weights, *self.weights.values()])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version)


def tensor(name: str, shape: Sequence[int | str | None] | None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, dtype, shape)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Reproducible float32 numbers, none of them special."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def weights_of(shapes: Mapping[str, tuple[int, ...]]) -> list[TensorProto]:
    """Random initializers: matrices scaled to keep magnitudes, vectors around one."""
    made = []
    for seed, (name, shape) in enumerate(shapes.items()):
        data = (
            random(*shape, seed=seed, scale=shape[0] ** -0.5) if len(shape) > 1 else 1 + random(*shape, seed=seed) / 4
        )
        made.append(numpy_helper.from_array(data.astype(np.float32), name))
    return made


def norms(opset: int = 17) -> ModelProto:
    """x -> RMSNorm -> linear -> SiLU -> + x -> LayerNorm, spelled in one opset."""
    nodes, D = Nodes(opset), 24
    y = nodes.silu(nodes("Add", nodes("MatMul", nodes.rms_norm("x", "gamma"), "w"), "b"))
    y = nodes.layer_norm(nodes("Add", y, "x"), "scale", "shift")
    nodes("Identity", y)
    nodes.protos[-1].output[0] = "y"
    weights = weights_of({"gamma": (D,), "w": (D, D), "b": (D,), "scale": (D,), "shift": (D,)})
    shape = ["batch", "sequence", D]
    return nodes.model([tensor("x", shape)], [tensor("y", shape)], weights, 8 if opset < 19 else 10)


NORMS = {"rms_norm": 1, "silu": 1, "skip_layer_norm": 1}  # what is to be found in `norms`
OPSETS = tuple(range(13, MAX_OPSET + 1))


def decoder(
    layers: int = 1,
    *,
    D: int = 32,
    F: int = 48,
    H: int = 2,
    V: int = 40,
    opset: int = 17,
    transposed: bool = False,
    weights: Callable[[dict[str, tuple[int, ...]]], Sequence[TensorProto]] = weights_of,
) -> ModelProto:
    """A decoder without positions or cache: token ids [batch, sequence] to logits, RMSNorm, attention, gated MLP.

    `weights` makes the initializers of the given names and shapes. `transposed` matrices are [out, in], as torch has them.
    """
    nodes, shapes = Nodes(opset), {"embed": (V, D), "final_norm": (D,), "head": (D, V)}
    split, merged = nodes.const([0, 0, H, D // H]), nodes.const([0, 0, D])
    scale = nodes.const((D // H) ** -0.5, np.float32)
    x = nodes("Gather", "embed", "input_ids")
    for layer in range(layers):

        def weight(name: str, *shape: int, layer: int = layer) -> str:
            name = f"layers.{layer}.{name}"
            turn = transposed and len(shape) == 2
            shapes[name] = shape[::-1] if turn else shape
            return str(nodes("Transpose", name, perm=[1, 0])) if turn else name

        h = nodes.rms_norm(x, weight("norm", D))
        q, k, v = (
            nodes("Transpose", nodes("Reshape", nodes("MatMul", h, weight(part, D, D)), split), perm=perm)
            for part, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3)))
        )
        scores = nodes("Softmax", nodes("Mul", nodes("MatMul", q, k), scale), axis=-1)
        heads = nodes("Transpose", nodes("MatMul", scores, v), perm=(0, 2, 1, 3))
        x = nodes("Add", x, nodes("MatMul", nodes("Reshape", heads, merged), weight("o", D, D)))
        h = nodes.rms_norm(x, weight("mlp_norm", D))
        gate = nodes.silu(nodes("MatMul", h, weight("gate", D, F)))
        up = nodes("MatMul", h, weight("up", D, F))
        x = nodes("Add", x, nodes("MatMul", nodes("Mul", gate, up), weight("down", F, D)))
    logits = nodes("MatMul", nodes.rms_norm(x, "final_norm"), "head")
    nodes.protos[-1].output[0] = logits = "logits"
    ids = tensor("input_ids", ["batch", "sequence"], TensorProto.INT64)
    return nodes.model([ids], [tensor(logits, ["batch", "sequence", V])], weights(shapes))


def decoder_fusions(layers: int) -> dict[str, int]:
    """What is to be found in `decoder`."""
    return {
        "rms_norm": 1,
        "skip_rms_norm": 2 * layers,
        "qkv_linear": layers,
        "gate_up_linear": layers,
        "gated_mlp": layers,
        "attention": layers,
    }


def save_external(model: ModelProto, path: Path, location: str = "weights.bin", threshold: int = 0) -> Path:
    """Saves a model with its initializers beside it; returns the path of the data."""
    copy = ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(
        copy, path, save_as_external_data=True, location=location, size_threshold=threshold, convert_attribute=False
    )
    return path.parent / location


def entry(tensor_: TensorProto, key: str) -> Any:
    """The external-data entry `key`, to be changed."""
    return next(e for e in tensor_.external_data if e.key == key)
