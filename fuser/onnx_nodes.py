"""Attributes and nodes between fuser's plain values and ONNX's protobufs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from fuser.constants import Array, Constant, Proto
from fuser.dtypes import DType
from fuser.errors import InputError
from fuser.graph import Node


@dataclass(frozen=True)
class Reference:
    """Inside a function's body: the value of one of the function's own float attributes."""

    name: str


_READERS: dict[int, Callable[[AttributeProto], Any]] = {
    AttributeProto.FLOAT: lambda a: a.f,
    AttributeProto.INT: lambda a: a.i,
    AttributeProto.STRING: lambda a: a.s.decode(),
    AttributeProto.FLOATS: lambda a: tuple(a.floats),
    AttributeProto.INTS: lambda a: tuple(a.ints),
    AttributeProto.STRINGS: lambda a: tuple(s.decode() for s in a.strings),
}


def read_attribute(attribute: AttributeProto) -> Any:
    """The plain value of an attribute; None for the kinds that are carried as they are (graphs, types, odd bytes)."""
    if attribute.ref_attr_name:
        return None
    if attribute.type == AttributeProto.TENSOR:
        return constant_of(attribute.t)
    if attribute.type in (AttributeProto.FLOATS, AttributeProto.STRINGS) and not (
        attribute.floats or attribute.strings
    ):
        return None  # a plain empty tuple would go out as INTS
    reader = _READERS.get(attribute.type)
    if reader is None:
        return None
    try:
        return reader(attribute)
    except UnicodeDecodeError:
        return None


def constant_of(tensor: TensorProto) -> Constant:
    """The constant inside a TensorProto whose data came with it.

    Raises:
        InputError: the data does not fill the shape.
    """
    dtype, shape = DType.from_onnx(tensor.data_type), tuple(tensor.dims)
    constant = Proto(tensor, dtype, shape)
    if dtype is DType.OTHER:
        raise InputError(f"tensor '{tensor.name}' has an element type fuser does not know (code {tensor.data_type})")
    if any(dim < 0 for dim in shape):
        raise InputError(f"tensor '{tensor.name}' has a negative dim: {list(shape)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        raise InputError(f"tensor '{tensor.name}' is external data in a place where there can be none")
    if tensor.HasField("raw_data") and dtype is not DType.STRING:
        found, needed, unit = len(tensor.raw_data), constant.nbytes, "bytes"
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        found, unit = len(getattr(tensor, field)), f"elements of {field}"
        needed = (constant.size + 1) // 2 if dtype.bits == 4 else constant.size
        needed *= 2 if dtype in (DType.COMPLEX64, DType.COMPLEX128) else 1
    if found != needed:
        raise InputError(f"tensor '{tensor.name}' holds {found} {unit}, its shape {list(shape)} needs {needed}")
    return constant


def write_attribute(name: str, value: Any) -> AttributeProto:
    """An attribute from a plain value."""
    if isinstance(value, Reference):
        return AttributeProto(name=name, type=AttributeProto.FLOAT, ref_attr_name=value.name)
    if isinstance(value, Constant):
        return onnx.helper.make_attribute(name, tensor_proto("", value))
    if isinstance(value, tuple) and not value:
        return onnx.helper.make_attribute(name, [], attr_type=AttributeProto.INTS)
    return onnx.helper.make_attribute(name, list(value) if isinstance(value, tuple) else value)


def tensor_proto(name: str, constant: Constant) -> TensorProto:
    """A TensorProto with its data inside."""
    if isinstance(constant, Proto):
        copy = TensorProto()
        copy.CopyFrom(constant.proto)
        copy.name = name
        return copy
    proto = TensorProto(name=name, data_type=constant.dtype.onnx, dims=constant.shape)
    if isinstance(constant, Array) and constant.dtype is DType.STRING:
        proto.string_data.extend(s if isinstance(s, bytes) else s.encode() for s in constant.array.reshape(-1))
    else:
        proto.raw_data = b"".join(constant.blocks())
    return proto


def node_proto(node: Node) -> onnx.NodeProto:
    """The NodeProto of a node in ONNX's own spelling."""
    proto = onnx.helper.make_node(
        node.op,
        [value.name if value else "" for value in node.inputs],
        [value.name for value in node.outputs],
        name=node.name or None,
        domain=node.domain or None,
    )
    complete(proto, node)
    return proto


def complete(proto: onnx.NodeProto, node: Node) -> None:
    """Adds a node's attributes and metadata to its proto."""
    proto.attribute.extend(write_attribute(name, value) for name, value in node.attributes.items() if value is not None)
    proto.attribute.extend(node.carried)
    for key, text in node.metadata:
        proto.metadata_props.add(key=key, value=text)
