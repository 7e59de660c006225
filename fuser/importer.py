"""From an ONNX file to a Graph: checked, functions inlined, weights left on disk."""

import ast
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto

from fuser import dims
from fuser.constants import Array, Constant, Stored
from fuser.dtypes import MAX_OPSET, DType
from fuser.errors import InputError, UsageError
from fuser.graph import Graph, Node, Origin, Value
from fuser.inlining import inline
from fuser.onnx_nodes import constant_of, read_attribute

MIN_OPSET = 13
MAX_MODEL_BYTES = 2 << 30  # protobuf's own limit


def load(path: str | os.PathLike[str], freeze: Mapping[str, int] | None = None) -> Graph:
    """Reads an ONNX file (opset 13 or newer, external data included) into a Graph.

    Args:
        path: the file.
        freeze: sizes for named dims, e.g. `{"batch": 1}`.

    Raises:
        InputError: the file cannot be read, is not ONNX, or refers to data that is missing or outside its folder.
        UsageError: `freeze` names a dim the model does not have.
    """
    path = Path(path)
    model = read_model(path)
    return from_proto(model, path.parent, freeze, path)


def read_model(path: Path) -> ModelProto:
    """The ModelProto in a file, its external data not loaded."""
    try:
        if path.is_dir():
            raise InputError(f"'{path}' is a directory; give the .onnx file in it")
        if not path.is_file() and path.exists():
            raise InputError(f"'{path}' is not a regular file")
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise InputError(f"'{path}' is not an ONNX file: it has more than the 2 GiB that one can have")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist") from None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from None
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise InputError(f"'{path}' is not an ONNX file (its {len(data)} bytes are no ModelProto)") from None
    if not model.HasField("graph") or not model.opset_import or not model.graph.output:
        raise InputError(f"'{path}' is not an ONNX model: it has no graph with outputs, or no opset")
    return model


def external_files(model: ModelProto, folder: Path) -> set[Path]:
    """The files beside a model that hold its weights."""
    found = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return {folder / location for location in found}


def from_proto(
    model: ModelProto, folder: Path, freeze: Mapping[str, int] | None = None, path: Path | None = None
) -> Graph:
    """A Graph from a ModelProto whose external data lies under `folder`. The proto is taken over."""
    where = f"'{path}'" if path else "the model"
    _check_text(model)
    opsets = {entry.domain if entry.domain != "ai.onnx" else "": entry.version for entry in model.opset_import}
    opset = opsets.pop("", 0)
    if not opset:
        raise InputError(f"{where} names no opset of the standard operators (it imports only {sorted(opsets)})")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"{where} is opset {opset}; fuser reads {MIN_OPSET} to {MAX_OPSET}")
    if model.functions:
        model = inline(model)
        opsets.update({e.domain: e.version for e in model.opset_import if e.domain not in ("", "ai.onnx")})
    if freeze:
        _freeze(model.graph, freeze)
    graph = Graph(model.graph.name, opset)
    graph.opsets = opsets
    graph.interface = {info.name: info for info in (*model.graph.input, *model.graph.output)}
    _Reader(graph, model, folder, path).read()
    graph.header = ModelProto()
    graph.header.CopyFrom(_without_graph(model))
    return graph


def _without_graph(model: ModelProto) -> ModelProto:
    header = ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
    )
    header.metadata_props.extend(model.metadata_props)
    header.graph.doc_string = model.graph.doc_string
    header.graph.metadata_props.extend(model.graph.metadata_props)
    return header


def _freeze(graph: GraphProto, sizes: Mapping[str, int]) -> None:
    declared = {
        d.dim_param
        for v in graph.input
        for d in v.type.tensor_type.shape.dim
        if d.HasField("dim_param") and d.dim_param
    }
    for name, size in sizes.items():
        if name not in declared:
            known = ", ".join(sorted(declared)) or "none"
            raise UsageError(
                f"--dim {name}={size}: the model's inputs have no dim called '{name}' (named dims: {known})"
            )
        if size < 0:
            raise UsageError(f"--dim {name}={size}: a dim cannot be negative")
        if size >= 1 << 31:
            raise UsageError(f"--dim {name}={size}: the dim is too large")
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


class _Reader:
    """Turns one GraphProto into the nodes and values of a Graph."""

    def __init__(self, graph: Graph, model: ModelProto, folder: Path, path: Path | None) -> None:
        self.graph, self.model, self.folder, self.path = graph, model, folder, path
        self.values: dict[str, Value] = {}
        self.labels: set[str] = set()  # what origins call the nodes so far
        self.schemas: dict[tuple[str, str], onnx.defs.OpSchema | None] = {}

    def read(self) -> None:
        proto = self.model.graph
        self._check_names(proto)
        for sparse in proto.sparse_initializer:
            self.values[sparse.values.name] = self._value(sparse.values.name, constant=_dense(sparse))
        for tensor in proto.initializer:
            self.values[tensor.name] = self._value(tensor.name, constant=self._constant(tensor))
        for info in proto.input:
            if info.name not in self.values:
                self.values[info.name] = value = self._value(info.name)
                self._declare(value, info)
                self.graph.inputs.append(value)
        # graphsurgeon links nodes and tensors; what it would rewrite or drop (control-flow bodies, unusual attributes,
        # metadata) is read from the protobuf itself, whose nodes stand in the same order.
        bare = GraphProto(name=proto.name)
        for node in proto.node:
            bare.node.add(
                op_type=node.op_type, domain=node.domain, name=node.name, input=node.input, output=node.output
            )
        for source, full in zip(gs.import_onnx(onnx.helper.make_model(bare)).nodes, proto.node, strict=True):
            self._node(source, full)
        declared = {info.name: info for info in proto.value_info}
        for name, value in self.values.items():
            if value.producer is not None and name in declared:
                self._hint(value, declared[name])
        for info in proto.output:
            if info.name not in self.values:
                raise InputError(f"output '{info.name}' is made by no node")
            value = self.values[info.name]
            value.is_output = True
            self.graph.outputs.append(value)
            self.graph.output_names.append(info.name)
        self._order()

    def _check_names(self, proto: GraphProto) -> None:
        """Every name is given once. An initializer may be an input as well: it is that input's value."""
        weights = [tensor.name for tensor in proto.initializer] + [s.values.name for s in proto.sparse_initializer]
        for kind, names in (("initializer", weights), ("input", [info.name for info in proto.input])):
            if twice := next((name for name, count in Counter(names).items() if count > 1), None):
                raise InputError(f"{kind} '{twice}' is declared twice")
        made: set[str] = {info.name for info in proto.input} | set(weights)
        for node in proto.node:
            for name in node.output:
                if name and name in made:
                    raise InputError(f"'{name}' is made twice, the second time by node '{node.name}' ({node.op_type})")
                made.add(name)
        # What fuser adds must not take a name that a control-flow body uses for itself.
        self.graph.names.update(
            name for node in proto.node for attribute in node.attribute for name in _inner_names(attribute)
        )

    def _value(self, name: str, constant: Constant | None = None) -> Value:
        self.graph.names.add(name)
        if constant is None:
            return Value(name)
        return Value(name, constant.dtype, constant.shape, constant=constant)

    def _declare(self, value: Value, info: onnx.ValueInfoProto) -> None:
        """Type and dims of an input; each named dim becomes a symbol, found at its first occurrence."""
        if not info.type.HasField("tensor_type"):
            return
        tensor = info.type.tensor_type
        value.dtype = DType.from_onnx(tensor.elem_type)
        if not tensor.HasField("shape"):
            return
        shape: list[dims.Dim] = []
        for axis, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value >= 0:
                shape.append(dim.dim_value)
                continue
            if dim.dim_param.isdecimal() and len(dim.dim_param) < 10:  # a number that an exporter wrote as a name
                shape.append(int(dim.dim_param))
                continue
            found = dims.symbol(dim.dim_param or f"{value.name}[{axis}]")
            self.graph.define(found, value, axis)
            shape.append(found)
        value.shape = tuple(shape)

    def _hint(self, value: Value, info: onnx.ValueInfoProto) -> None:
        """What the file says of an intermediate value: its type and rank, and the dims that are numbers."""
        if info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape"):
            value.dtype = DType.from_onnx(info.type.tensor_type.elem_type)
            shape: list[dims.Dim] = []
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                own = dims.symbol(f"{value.name}[{axis}]")
                if dim.HasField("dim_value") and dim.dim_value >= 0:
                    shape.append(dim.dim_value)
                else:
                    self.graph.define(own, value, axis)
                    shape.append(own)
            value.shape = tuple(shape)

    def _constant(self, tensor: TensorProto) -> Constant:
        if tensor.data_location != TensorProto.EXTERNAL:
            return constant_of(tensor)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = self._external_file(tensor.name, location)
        dtype, shape = DType.from_onnx(tensor.data_type), tuple(tensor.dims)
        try:
            offset = int(entries.get("offset", 0))
            constant = Stored(file, offset, dtype, shape)
            length = int(entries.get("length", constant.nbytes))
        except ValueError:
            raise InputError(
                f"tensor '{tensor.name}': the offset or length of its external data is not a number"
            ) from None
        if dtype is DType.OTHER or not dtype.bits or any(dim < 0 for dim in shape):
            raise InputError(f"tensor '{tensor.name}' cannot lie in external data as {dtype}{list(shape)}")
        if length != constant.nbytes:
            raise InputError(
                f"tensor '{tensor.name}': {length} bytes of external data, its shape {list(shape)} needs {constant.nbytes}"
            )
        size = file.stat().st_size
        if offset < 0 or offset + length > size:
            raise InputError(
                f"tensor '{tensor.name}' lies at {offset}..{offset + length} of '{location}', which has only {size} bytes"
            )
        return constant

    def _external_file(self, name: str, location: str) -> Path:
        parts = Path(location).parts
        if not location or Path(location).is_absolute() or ".." in parts:
            raise InputError(f"tensor '{name}': external data '{location}' lies outside the model's folder")
        file = self.folder / location
        try:
            found = file.is_file()
        except OSError:  # a name too long, a folder that may not be entered
            found = False
        if not found:
            raise InputError(f"tensor '{name}': external data '{location}' is missing from '{self.folder}'")
        if not os.access(file, os.R_OK):
            raise InputError(f"tensor '{name}': external data '{location}' cannot be read")
        # A link may lead out of the folder only where the model itself is a link into the same place (a download cache).
        homes = [self.folder.resolve()] + ([self.path.resolve().parent] if self.path else [])
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise InputError(f"tensor '{name}': external data '{location}' is a link out of the model's folder")
        return file

    def _node(self, source: gs.Node, proto: onnx.NodeProto) -> None:
        self._check_form(proto)
        attributes: dict[str, Any] = {}
        carried: list[AttributeProto] = []
        for attribute in proto.attribute:
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_location == TensorProto.EXTERNAL:
                attributes[attribute.name] = self._constant(attribute.t)
                continue
            value = read_attribute(attribute)
            if value is None:
                carried.append(attribute)
            else:
                attributes[attribute.name] = value
        domain = "" if source.domain in (None, "ai.onnx") else source.domain
        if source.op == "Constant" and not domain and (constant := _constant_node(proto, attributes)) is not None:
            name = source.outputs[0].name
            self.values[name] = self._filled(name, constant)
            return
        inputs = [None if tensor.is_empty() else self._lookup(tensor.name) for tensor in source.inputs]
        node = Node(source.op, inputs, [], attributes, domain, source.name or "", carried=tuple(carried))
        node.metadata = tuple((entry.key, entry.value) for entry in proto.metadata_props)
        label = source.name
        if not label or label in self.labels:
            label = next((t.name for t in source.outputs if not t.is_empty()), source.op)
        self.labels.add(label)
        node.origin = Origin((label,), module_path(node))
        for index, tensor in enumerate(source.outputs):
            # An output left out still has its position; it goes out without a name again.
            value = Value("") if tensor.is_empty() else self._lookup(tensor.name)
            value.producer, value.index = node, index
            node.outputs.append(value)
        captured = [self._lookup(name) for attribute in carried for name in _outer_names(attribute)]
        node.captures = tuple(dict.fromkeys(captured))
        self.graph.insert(node)

    def _check_form(self, node: onnx.NodeProto) -> None:
        """A standard operator has as many inputs and outputs, and the attributes, that its schema asks for."""
        key = (node.domain, node.op_type)
        if key not in self.schemas:
            known = node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type)
            try:
                self.schemas[key] = onnx.defs.get_schema(node.op_type, self.graph.opset) if known else None
            except onnx.defs.SchemaError:
                self.schemas[key] = None
        schema = self.schemas[key]
        if schema is None:
            return
        given = {attribute.name for attribute in node.attribute}
        missing = sorted(name for name, a in schema.attributes.items() if a.required and name not in given)
        if missing:
            raise InputError(f"node '{node.name}' ({node.op_type}) lacks its attribute {', '.join(missing)}")
        for kind, found, least, most in (
            ("inputs", node.input, schema.min_input, schema.max_input),
            ("outputs", node.output, schema.min_output, schema.max_output),
        ):
            if not least <= len(found) <= most:
                raise InputError(f"node '{node.name}' ({node.op_type}) has {len(found)} {kind}")

    def _filled(self, name: str, constant: Constant) -> Value:
        value = self._lookup(name)
        value.dtype, value.shape, value.constant = constant.dtype, constant.shape, constant
        return value

    def _lookup(self, name: str) -> Value:
        if name not in self.values:
            self.values[name] = self._value(name)
        return self.values[name]

    def _order(self) -> None:
        """Nodes must come in topological order; one that reads what is made later, or never, is an error."""
        ready = {id(value) for value in self.graph.inputs}
        for node in self.graph.nodes:
            for value in (*node.inputs, *node.captures):
                if value is not None and value.constant is None and id(value) not in ready:
                    made = "only later" if value.producer else "by no node"
                    raise InputError(f"node '{node.name}' ({node.op}) reads '{value.name}', which is made {made}")
            ready.update(map(id, node.outputs))


_CONSTANTS = {
    "value_float": DType.FLOAT32,
    "value_floats": DType.FLOAT32,
    "value_int": DType.INT64,
    "value_ints": DType.INT64,
    "value_string": DType.STRING,
    "value_strings": DType.STRING,
}


def _constant_node(proto: onnx.NodeProto, attributes: dict[str, Any]) -> Constant | None:
    """The data of a Constant node, in any of the attributes it may stand in."""
    if len(proto.attribute) != 1:
        return None
    (attribute,) = proto.attribute
    if attribute.type == AttributeProto.SPARSE_TENSOR:
        return _dense(attribute.sparse_tensor)
    if attribute.type == AttributeProto.TENSOR:
        found: Constant = attributes[attribute.name]
        return found
    if attribute.name not in _CONSTANTS or attribute.ref_attr_name:
        return None
    return Array.of(onnx.helper.get_attribute_value(attribute), _CONSTANTS[attribute.name])


def _dense(sparse: onnx.SparseTensorProto) -> Constant:
    name, shape = sparse.values.name, tuple(sparse.dims)
    values, indices = constant_of(sparse.values).numpy(), constant_of(sparse.indices).numpy()
    if values.ndim != 1 or indices.shape not in ((values.size,), (values.size, len(shape))):
        raise InputError(f"sparse tensor '{name}': indices {list(indices.shape)} for {values.size} values")
    if math.prod(shape) > MAX_MODEL_BYTES or any(dim < 0 for dim in shape):
        raise InputError(f"sparse tensor '{name}' cannot be made dense: its shape is {list(shape)}")
    dense = np.zeros(shape, values.dtype)
    bounds = (dense.size,) if indices.ndim == 1 else shape
    if indices.size and not ((indices >= 0) & (indices < np.array(bounds))).all():
        raise InputError(f"sparse tensor '{name}' has an index outside {list(shape)}")
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
    dense.reshape(-1)[flat] = values
    return Array(dense, DType.from_onnx(sparse.values.data_type), dense.shape)


def _check_text(message: Message) -> None:
    """Names must be text: protobuf hands those that are not UTF-8 out as bytes."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for item in (value,) if isinstance(value, (str, bytes, Message)) else value:
            if isinstance(item, Message):
                _check_text(item)
            elif isinstance(item, bytes):
                raise InputError(f"the model has a {field.name} that is not UTF-8: {item!r:.80}")


def _inner_names(attribute: AttributeProto) -> Iterator[str]:
    """The names made inside the control-flow bodies of an attribute."""
    for body in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
        yield from (info.name for info in body.input)
        yield from (tensor.name for tensor in body.initializer)
        yield from (sparse.values.name for sparse in body.sparse_initializer)
        for node in body.node:
            yield from node.output
            for inner in node.attribute:
                yield from _inner_names(inner)


def _outer_names(attribute: AttributeProto) -> Iterator[str]:
    """The names a control-flow body reads from outside itself, in order."""
    for body in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
        own = {info.name for info in body.input} | {tensor.name for tensor in body.initializer}
        own |= {sparse.values.name for sparse in body.sparse_initializer} | {
            name for node in body.node for name in node.output
        }
        for node in body.node:
            yield from (name for name in node.input if name and name not in own)
            for inner in node.attribute:
                yield from (name for name in _outer_names(inner) if name not in own)
        yield from (info.name for info in body.output if info.name not in own)


def module_path(node: Node) -> str:
    """The module that made a node, from whatever the exporter left: scopes in metadata, or a path in the node's name."""
    metadata = dict(node.metadata)
    if "fuser.module" in metadata:
        return metadata["fuser.module"]
    scopes = metadata.get("pkg.torch.onnx.name_scopes")
    if scopes:
        try:
            found = ast.literal_eval(scopes)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
        if isinstance(found, list) and len(found) > 1 and isinstance(found[-2], str):
            return found[-2]
    if node.name.startswith("/") and node.name.count("/") > 1:
        return ".".join(re.split("/+", node.name.strip("/"))[:-1])
    return ""
