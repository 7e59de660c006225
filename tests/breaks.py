"""One layer of a model broken in one place, in every way that has come to mind: what `fuse explain` must put its finger on.

    model, broken = breaks.planted("softmax over the queries")

A break is a function of a `Layer` of the demo model, which notes the names of the nodes that it changes or adds. To add a
break, write one more function below; its name, with spaces, is the break's name. The file must stay one that ONNX Runtime loads.
"""

import ast
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

DEMO = Path(__file__).parent.parent / "models" / "demo" / "model.onnx"
LAYERS = 5


class Layer:
    """The nodes of one layer, found by module and operator, and the few ways to change them."""

    def __init__(self, model: ModelProto, index: int) -> None:
        self.graph, self.index = model.graph, index
        self.broken: set[str] = set()  # the names of the nodes that were changed or added
        self.modules: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
            path = ast.literal_eval(scopes)[-2] if scopes else ""
            prefix = f"model.layers.{index}"
            if path == prefix or path.startswith(f"{prefix}."):
                self.modules.setdefault(path[len(prefix) + 1 :], []).append(node)

    def node(self, module: str, op: str, nth: int = 0) -> NodeProto:
        """The nth node of that operator in a module (`self_attn`; "" is the layer itself)."""
        return [node for node in self.modules[module] if node.op_type == op][nth]

    def change(self, node: NodeProto, op: str | None = None, **attributes: Any) -> NodeProto:
        """Gives a node another operator or other attributes."""
        self.broken.add(node.name)
        node.op_type = op or node.op_type
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])
        return node

    def reads(self, node: NodeProto, index: int, value: str) -> None:
        """Makes a node read another value."""
        self.broken.add(node.name)
        node.input[index] = value

    def add(self, before: NodeProto, op: str, *inputs: str, **attributes: Any) -> str:
        """A new node in front of another one; gives what it makes."""
        name = f"planted_{len(self.broken)}_{self.index}"
        self.broken.add(name)
        node = helper.make_node(op, inputs, [f"{name}_value"], name=name, **attributes)
        node.metadata_props.extend(before.metadata_props)
        place = next(i for i, other in enumerate(self.graph.node) if other is before or other.name == before.name)
        self.graph.node.insert(place, node)
        return f"{name}_value"

    def between(self, node: NodeProto, index: int, op: str, *more: str, **attributes: Any) -> None:
        """A new node between a node and one of its inputs; the reader is not what is broken."""
        node.input[index] = self.add(node, op, node.input[index], *more, **attributes)

    def const(self, data: Any, dtype: Any = np.float32) -> str:
        name = f"planted_constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(data, dtype), name))
        return name

    def weight(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(next(tensor for tensor in self.graph.initializer if tensor.name == name))

    def input(self, shape: Iterable[int | str]) -> str:
        """A new input of the model."""
        name = f"planted_input_{self.index}"
        self.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name

    def output(self, value: str) -> None:
        """A value becomes an output of the model."""
        self.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))

    # What the demo's layer is made of, by what it is for.

    def turned(self, nth: int) -> NodeProto:
        """The Concat of rotate_half, of queries (0) and keys (1)."""
        return [
            node for node in self.modules["self_attn"] if node.op_type == "Concat" and node.input[0].startswith("neg")
        ][nth]

    def cache(self, nth: int) -> NodeProto:
        """The Concat of past and new, of keys (0) and values (1)."""
        return [
            node for node in self.modules["self_attn"] if node.op_type == "Concat" and node.input[0].startswith("past")
        ][nth]

    def reader(self, value: str) -> NodeProto:
        return next(node for node in self.graph.node if value in node.input)

    def maker(self, value: str) -> NodeProto:
        return next(node for node in self.graph.node if value in node.output)

    @property
    def normed(self) -> NodeProto:
        """The last node of the norm before attention."""
        return self.node("input_layernorm", "Mul", 1)


BREAKS: dict[str, Callable[[Layer], None]] = {}


def _break(function: Callable[[Layer], None]) -> Callable[[Layer], None]:
    BREAKS[function.__name__.strip("_").replace("_", " ")] = function
    return function


@cache
def _demo() -> bytes:
    return DEMO.read_bytes()


def planted(name: str, layers: Iterable[int] = (2,)) -> tuple[ModelProto, set[str]]:
    """The demo model with a break in some layers, and the names of the nodes that are broken."""
    model, broken = onnx.load_from_string(_demo()), set[str]()
    for index in layers:
        layer = Layer(model, index)
        BREAKS[name](layer)
        broken |= layer.broken
    return model, broken


# Rotary embeddings


@_break
def halves_swapped(layer: Layer) -> None:
    concat = layer.turned(0)
    first, second = concat.input
    layer.reads(concat, 0, second)
    layer.reads(concat, 1, first)


@_break
def no_neg(layer: Layer) -> None:
    concat = layer.turned(1)
    layer.reads(concat, 0, layer.maker(concat.input[0]).input[0])


@_break
def neg_of_the_other_half(layer: Layer) -> None:
    concat = layer.turned(0)
    neg = layer.maker(concat.input[0])
    layer.reads(neg, 0, concat.input[1])


@_break
def slice_from_another_bound(layer: Layer) -> None:
    half = layer.node("self_attn", "Slice", 1)
    layer.reads(half, 1, layer.const([8], np.int64))
    layer.reads(half, 2, layer.const([24], np.int64))


@_break
def sin_for_cos(layer: Layer) -> None:
    direct = layer.node("self_attn", "Mul", 0)
    layer.reads(direct, 1, layer.node("self_attn", "Mul", 1).input[1])


@_break
def halves_subtracted(layer: Layer) -> None:
    layer.change(layer.node("self_attn", "Add", 0), "Sub")


# Norms


@_break
def epsilon_after_the_root(layer: Layer) -> None:
    add, root = layer.node("input_layernorm", "Add"), layer.node("input_layernorm", "Sqrt")
    epsilon = add.input[1]
    del add.input[1]
    layer.change(add, "Sqrt")
    layer.change(root, "Add").input.append(epsilon)


@_break
def mean_over_the_tokens(layer: Layer) -> None:
    layer.reads(layer.node("post_attention_layernorm", "ReduceMean"), 1, layer.const([-2], np.int64))


@_break
def mean_of_x(layer: Layer) -> None:
    mean = layer.node("input_layernorm", "ReduceMean")
    layer.reads(mean, 0, layer.node("input_layernorm", "Pow").input[0])


@_break
def cubed(layer: Layer) -> None:
    layer.reads(layer.node("post_attention_layernorm", "Pow"), 1, layer.const(3.0))


@_break
def norm_weight_of_rank_2(layer: Layer) -> None:
    mul = layer.node("input_layernorm", "Mul", 1)
    layer.reads(mul, 0, layer.const(layer.weight(mul.input[0])[None] * np.ones((1, 1, 1))))


@_break
def norm_weight_of_every_token(layer: Layer) -> None:
    mul = layer.node("input_layernorm", "Mul", 1)
    layer.reads(mul, 0, layer.input([192, 192]))


@_break
def epsilon_of_every_channel(layer: Layer) -> None:
    layer.reads(layer.node("post_attention_layernorm", "Add"), 1, layer.const(np.linspace(1e-5, 2e-5, 192)))


@_break
def half_precision_inside_the_norm(layer: Layer) -> None:
    mul = layer.node("input_layernorm", "Mul", 0)
    mul.input[1] = layer.add(
        mul, "Cast", layer.add(mul, "Cast", mul.input[1], to=TensorProto.FLOAT16), to=TensorProto.FLOAT
    )


@_break
def another_value_scaled(layer: Layer) -> None:
    layer.reads(layer.node("post_attention_layernorm", "Mul", 0), 0, layer.normed.output[0])


# Residuals


@_break
def residual_subtracted(layer: Layer) -> None:
    layer.change(layer.node("", "Add", 0), "Sub")


@_break
def residual_clipped(layer: Layer) -> None:
    """Between the sum and the norm that reads it."""
    add, norm = layer.node("", "Add", 0), layer.node("post_attention_layernorm", "Pow")
    clipped = layer.add(norm, "Clip", add.output[0], layer.const(-50.0), layer.const(50.0))
    norm.input[0] = layer.node("post_attention_layernorm", "Mul", 0).input[0] = clipped


@_break
def residual_of_a_constant(layer: Layer) -> None:
    add = layer.node("", "Add", 0)
    layer.reads(add, 0, layer.const(np.linspace(-1, 1, 192)))


@_break
def residual_of_another_value(layer: Layer) -> None:
    """The norm's result, not its input: a residual add all the same."""
    layer.reads(layer.node("", "Add", 0), 0, layer.normed.output[0])


# Projections


@_break
def queries_of_another_input(layer: Layer) -> None:
    layer.reads(layer.node("self_attn.q_proj", "MatMul"), 0, layer.node("input_layernorm", "Pow").input[0])


@_break
def values_of_another_input(layer: Layer) -> None:
    layer.reads(layer.node("self_attn.v_proj", "MatMul"), 0, layer.node("input_layernorm", "Pow").input[0])


@_break
def key_weight_fed_in(layer: Layer) -> None:
    layer.reads(layer.node("self_attn.k_proj", "MatMul"), 1, layer.input([192, 64]))


@_break
def up_of_another_input(layer: Layer) -> None:
    layer.reads(layer.node("mlp.up_proj", "MatMul"), 0, layer.node("post_attention_layernorm", "Pow").input[0])


@_break
def gate_weight_fed_in(layer: Layer) -> None:
    layer.reads(layer.node("mlp.gate_proj", "MatMul"), 1, layer.input([192, 416]))


# Attention


@_break
def softmax_over_the_queries(layer: Layer) -> None:
    layer.change(layer.node("self_attn", "Softmax"), axis=-2)


@_break
def sigmoid_for_softmax(layer: Layer) -> None:
    softmax = layer.node("self_attn", "Softmax")
    del softmax.attribute[:]
    layer.change(softmax, "Sigmoid")


@_break
def scale_fed_in(layer: Layer) -> None:
    scaled = layer.maker(layer.reader(layer.node("self_attn", "Transpose", -2).output[0]).output[0])
    del scaled
    queries = layer.maker(layer.maker(layer.node("self_attn", "Softmax").input[0]).input[0]).input[0]
    layer.reads(layer.maker(queries), 1, layer.input([]))


@_break
def mask_after_the_softmax(layer: Layer) -> None:
    softmax = layer.node("self_attn", "Softmax")
    masked = layer.maker(softmax.input[0])
    weights = softmax.output[0]
    layer.reads(softmax, 0, masked.input[0])
    softmax.output[0] = masked.output[0]
    layer.reads(masked, 0, masked.output[0])
    masked.output[0] = weights
    nodes = list(layer.graph.node)
    i, j = nodes.index(masked), nodes.index(softmax)
    nodes[i], nodes[j] = nodes[j], nodes[i]
    del layer.graph.node[:]
    layer.graph.node.extend(nodes)


@_break
def guarded_by_one(layer: Layer) -> None:
    layer.reads(layer.node("self_attn", "Where", -1), 1, layer.const(1.0))


@_break
def scores_read_elsewhere(layer: Layer) -> None:
    softmax = layer.node("self_attn", "Softmax")
    layer.output(layer.add(softmax, "Abs", layer.maker(softmax.input[0]).input[0]))


@_break
def weights_given_out(layer: Layer) -> None:
    softmax = layer.node("self_attn", "Softmax")
    layer.output(softmax.output[0])
    layer.broken.add(softmax.name)


@_break
def keys_not_turned(layer: Layer) -> None:
    turn = next(
        node for node in layer.modules["self_attn"] if node.op_type == "Transpose" and len(node.attribute[0].ints) == 3
    )
    layer.change(turn, perm=[1, 0, 2])


@_break
def scores_clipped(layer: Layer) -> None:
    layer.between(layer.node("self_attn", "Softmax"), 0, "Clip", layer.const(-1e4), layer.const(1e4))


@_break
def values_scaled_by_channel(layer: Layer) -> None:
    """After the softmax, before the values: one factor a row."""
    softmax = layer.node("self_attn", "Softmax")
    reader = layer.node("self_attn", "Where", -1)
    assert reader.input[2] == softmax.output[0]
    layer.between(reader, 2, "Mul", layer.const(np.linspace(0.5, 1.5, 6).reshape(1, 6, 1, 1)))


# The cache


@_break
def new_keys_before_old(layer: Layer) -> None:
    concat = layer.cache(0)
    past, new = concat.input
    layer.reads(concat, 0, new)
    layer.reads(concat, 1, past)


@_break
def new_values_over_old_heads(layer: Layer) -> None:
    """What is read of the cache is a part of it."""
    concat = layer.cache(1)
    reader = next(
        node for node in layer.modules["self_attn"] if node.op_type == "Unsqueeze" and concat.output[0] in node.input
    )
    layer.between(reader, 0, "Neg")


# The MLP


@_break
def sigmoid_of_the_up_branch(layer: Layer) -> None:
    layer.reads(layer.node("mlp.act_fn", "Sigmoid"), 0, layer.node("mlp.up_proj", "MatMul").output[0])
    nodes = list(layer.graph.node)
    up = layer.node("mlp.up_proj", "MatMul")
    nodes.remove(up)
    nodes.insert(nodes.index(layer.node("mlp.act_fn", "Sigmoid")), up)
    del layer.graph.node[:]
    layer.graph.node.extend(nodes)


@_break
def tanh_for_sigmoid(layer: Layer) -> None:
    layer.change(layer.node("mlp.act_fn", "Sigmoid"), "Tanh")


@_break
def relu_after_the_activation(layer: Layer) -> None:
    gate = layer.node("mlp", "Mul")
    layer.between(gate, list(gate.input).index(layer.node("mlp.act_fn", "Mul").output[0]), "Relu")


@_break
def relu_after_the_gate(layer: Layer) -> None:
    layer.between(layer.node("mlp.down_proj", "MatMul"), 0, "Relu")


@_break
def gate_and_up_added(layer: Layer) -> None:
    layer.change(layer.node("mlp", "Mul"), "Add")


@_break
def activation_read_elsewhere(layer: Layer) -> None:
    gate = layer.node("mlp", "Mul")
    layer.output(layer.add(gate, "Neg", layer.node("mlp.act_fn", "Mul").output[0]))


@_break
def gate_doubled(layer: Layer) -> None:
    layer.between(layer.node("mlp.act_fn", "Sigmoid"), 0, "Mul", layer.const(1.702))
