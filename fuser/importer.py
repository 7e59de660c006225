"""From an ONNX file to a Graph: checked, functions inlined, weights left on disk."""

import ast
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto

from fuser import dims
from fuser.constants import Array, Constant, Stored
from fuser.dtypes import MAX_OPSET, DType
from fuser.errors import InputError, UsageError
from fuser.graph import Graph, Node, Origin, Value
from fuser.onnx_nodes import constant_of, read_attribute

MIN_OPSET = 13
MAX_INLINED_NODES = 1_000_000


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
    if path.is_dir():
        raise InputError(f"'{path}' is a directory; give the .onnx file in it")
    try:
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


def from_proto(
    model: ModelProto, folder: Path, freeze: Mapping[str, int] | None = None, path: Path | None = None
) -> Graph:
    """A Graph from a ModelProto whose external data lies under `folder`. The proto is taken over."""
    where = f"'{path}'" if path else "the model"
    opsets = {entry.domain if entry.domain != "ai.onnx" else "": entry.version for entry in model.opset_import}
    opset = opsets.pop("", 0)
    if not opset:
        raise InputError(f"{where} names no opset of the standard operators (it imports only {sorted(opsets)})")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"{where} is opset {opset}; fuser reads {MIN_OPSET} to {MAX_OPSET}")
    if model.functions:
        model = _inline(model)
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


def _inline(model: ModelProto) -> ModelProto:
    """The model with its local functions inlined, unless that would grow it past all use."""
    sizes: dict[tuple[str, str], int] = {}
    bodies = {(f.domain, f.name): f for f in model.functions}
    # Functions cannot be recursive; a bounded number of sweeps settles every nesting depth, and finds a cycle.
    for _ in range(len(bodies) + 1):
        changed = False
        for key, function in bodies.items():
            size = sum(sizes.get((node.domain, node.op_type), 1) for node in function.node)
            changed |= sizes.get(key) != size
            sizes[key] = size
            if size > MAX_INLINED_NODES:
                raise InputError(f"function '{key[0]}.{key[1]}' expands to more than {MAX_INLINED_NODES} nodes")
        if not changed:
            break
    else:
        raise InputError("the model's local functions call one another in a circle")
    if sum(sizes.get((node.domain, node.op_type), 1) for node in model.graph.node) > MAX_INLINED_NODES:
        raise InputError(f"the model's local functions expand to more than {MAX_INLINED_NODES} nodes")
    return onnx.inliner.inline_local_functions(model)


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
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


class _Reader:
    """Turns one GraphProto into the nodes and values of a Graph."""

    def __init__(self, graph: Graph, model: ModelProto, folder: Path, path: Path | None) -> None:
        self.graph, self.model, self.folder, self.path = graph, model, folder, path
        self.values: dict[str, Value] = {}

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
        made: set[str] = {info.name for info in proto.input}
        for node in proto.node:
            for name in node.output:
                if name and name in made:
                    raise InputError(f"'{name}' is made twice, the second time by node '{node.name}' ({node.op_type})")
                made.add(name)

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
            found = dims.symbol(dim.dim_param or f"{value.name}[{axis}]")
            self.graph.dim_sources.setdefault(found, (value, axis))
            shape.append(found)
        value.shape = tuple(shape)

    def _hint(self, value: Value, info: onnx.ValueInfoProto) -> None:
        """What the file says of an intermediate value: its type and rank, and the dims that are numbers."""
        if info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape"):
            value.dtype = DType.from_onnx(info.type.tensor_type.elem_type)
            shape: list[dims.Dim] = []
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                own = dims.symbol(f"{value.name}[{axis}]")
                if dim.HasField("dim_value"):
                    shape.append(dim.dim_value)
                else:
                    self.graph.dim_sources.setdefault(own, (value, axis))
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
        if not file.is_file():
            raise InputError(f"tensor '{name}': external data '{location}' is missing from '{self.folder}'")
        # A link may lead out of the folder only where the model itself is a link into the same place (a download cache).
        homes = [self.folder.resolve()] + ([self.path.resolve().parent] if self.path else [])
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise InputError(f"tensor '{name}': external data '{location}' is a link out of the model's folder")
        return file

    def _node(self, source: gs.Node, proto: onnx.NodeProto) -> None:
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
        if source.op == "Constant" and not domain and (constant := _constant_node(attributes)) is not None:
            name = source.outputs[0].name
            self.values[name] = self._filled(name, constant)
            return
        inputs = [None if tensor.is_empty() else self._lookup(tensor.name) for tensor in source.inputs]
        node = Node(source.op, inputs, [], attributes, domain, source.name or "", carried=tuple(carried))
        node.metadata = tuple((entry.key, entry.value) for entry in proto.metadata_props)
        label = source.name or next((t.name for t in source.outputs if not t.is_empty()), source.op)
        node.origin = Origin((label,), module_path(node))
        for index, tensor in enumerate(source.outputs):
            # An output left out still has its position; it gets a name nothing reads.
            value = self._value(self.graph.fresh_name("unused")) if tensor.is_empty() else self._lookup(tensor.name)
            value.producer, value.index = node, index
            node.outputs.append(value)
        captured = [self._lookup(name) for attribute in carried for name in _outer_names(attribute)]
        node.captures = tuple(dict.fromkeys(captured))
        self.graph.insert(node)

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


def _constant_node(attributes: dict[str, Any]) -> Constant | None:
    """The data of a Constant node, in any of the attributes it may stand in."""
    if len(attributes) != 1:
        return None
    ((key, value),) = attributes.items()
    if isinstance(value, Constant):
        return value
    kinds = {
        "value_float": DType.FLOAT32,
        "value_floats": DType.FLOAT32,
        "value_int": DType.INT64,
        "value_ints": DType.INT64,
    }
    return Array.of(value, kinds[key]) if key in kinds else None


def _dense(sparse: onnx.SparseTensorProto) -> Constant:
    import numpy as np

    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)
    try:
        dense.reshape(-1)[flat] = values
    except IndexError:
        raise InputError(f"sparse tensor '{sparse.values.name}' has an index outside {list(sparse.dims)}") from None
    return Array(dense, DType.from_onnx(sparse.values.data_type), dense.shape)


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
