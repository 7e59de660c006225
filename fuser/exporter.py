"""From a Graph to an ONNX file that appears whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto

from fuser import dims
from fuser.constants import Constant
from fuser.dtypes import DType
from fuser.errors import OutputError
from fuser.graph import FUSER, MICROSOFT, Graph, Value
from fuser.lowering import lower
from fuser.onnx_nodes import complete, tensor_proto
from fuser.version import __version__

INLINE_LIMIT = 256 << 20  # bytes of weights up to which a model is one file
INLINE_ALWAYS = 1024  # bytes: small constants stay in the model, where shape inference can read them
ALIGNMENT = 4096
# Operators whose outputs may be left out when nothing reads them; ONNX Runtime then does not compute them.
SPARING = {(MICROSOFT, "SkipLayerNormalization"), (MICROSOFT, "SkipSimplifiedLayerNormalization")}


@dataclass
class Artifact:
    """A model ready to be written: the proto, the weights that go beside it, and what was not written as it was wanted."""

    model: ModelProto
    external: list[tuple[TensorProto, Constant]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, inside and beside the model."""
        inside = sum(
            len(tensor.raw_data) or tensor.ByteSize()
            for tensor in self.model.graph.initializer
            if not tensor.external_data
        )
        return inside + sum(constant.nbytes for _, constant in self.external)

    def set_accuracy_level(self, level: int) -> None:
        """Of all products with codes: what ONNX Runtime may round their inputs to."""
        for node in self.model.graph.node if level else ():
            if (node.domain, node.op_type) == (MICROSOFT, "MatMulNBits"):
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", level))

    def write(self, path: str | os.PathLike[str], keep: Collection[Path] = ()) -> None:
        """Writes the model to `path` (and its weights beside it): whole, synced, then renamed into place.

        What stood at `path` before is untouched until then, and afterwards its own leftover weights are removed, unless
        they are among `keep`.

        Raises:
            OutputError: the disk is full, the folder is missing or not writable.
        """
        path = Path(path)
        with _reported(path):
            self._write(path, {file.resolve() for file in keep})

    def _write(self, path: Path, keep: set[Path]) -> None:
        previous = _weight_files(path)
        with contextlib.ExitStack() as cleanup:
            data: tuple[Path, Path] | None = None
            if self.external:
                temporary, digest = self._write_weights(path, cleanup)
                data = (temporary, path.with_name(f"{path.name}.{digest}.data"))
                for tensor, _ in self.external:
                    next(entry for entry in tensor.external_data if entry.key == "location").value = data[1].name
            model_file = _temporary(path, cleanup)
            with model_file.open("wb") as file:
                file.write(self.model.SerializeToString(deterministic=True))
                _sync(file)
            if data is not None:
                os.replace(*data)
            os.replace(model_file, path)
            _sync_folder(path.parent)
        for stale in previous - {data[1] if data else path}:
            if stale.resolve() not in keep:
                with contextlib.suppress(OSError):  # the new model stands: what is left over is no failure
                    stale.unlink()

    def _write_weights(self, path: Path, cleanup: contextlib.ExitStack) -> tuple[Path, str]:
        temporary, digest = _temporary(path, cleanup), hashlib.blake2b(digest_size=6)
        with temporary.open("wb") as file:
            for tensor, constant in self.external:
                start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
                digest.update(f"{start} ".encode())  # the name stands for where things lie as well
                file.write(b"\0" * (start - file.tell()))
                for block in constant.blocks():
                    digest.update(block)
                    file.write(block)
                del tensor.external_data[:]
                for key, text in (("location", ""), ("offset", str(start)), ("length", str(file.tell() - start))):
                    tensor.external_data.add(key=key, value=text)
            _sync(file)
        return temporary, digest.hexdigest()


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(f"'{path}' could not be written: {reason}; nothing was changed") from None


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all.

    Raises:
        OutputError: the disk is full, the folder is missing or not writable.
    """
    with _reported(path), contextlib.ExitStack() as cleanup:
        temporary = _temporary(path, cleanup)
        with temporary.open("wb") as file:
            file.write(text.encode())
            _sync(file)
        os.replace(temporary, path)


def _temporary(path: Path, cleanup: contextlib.ExitStack) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    cleanup.callback(lambda: Path(name).unlink(missing_ok=True))
    umask = os.umask(0)
    os.umask(umask)
    Path(name).chmod(0o666 & ~umask)
    return Path(name)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _weight_files(path: Path) -> set[Path]:
    """The weight files that a model fuser wrote at `path` earlier brought with it."""
    named = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    return {file for file in path.parent.iterdir() if named.fullmatch(file.name)}


def export(graph: Graph, target: str, fusions: Mapping[str, int]) -> Artifact:
    """The artifact of a fused graph for a target. The graph itself is not changed.

    Args:
        graph: the fused graph.
        target: one of `fuser.lowering.TARGETS`.
        fusions: what was fused, for the file's own summary.
    """
    lowered = graph.clone()
    notes: list[str] = []
    functions = lower(lowered, target, notes.append)
    _name_outputs(lowered)
    model = _assemble(lowered, functions)
    _stamp(model, graph, target, fusions)
    artifact = Artifact(model, notes=notes)
    constants = lowered.constants()
    if any(value.dtype in (DType.INT4, DType.UINT4) for value in constants):
        model.ir_version = max(model.ir_version, 10)
    inline = sum(value.constant.nbytes for value in constants if value.constant) <= INLINE_LIMIT
    for value in constants:
        constant = value.constant
        assert constant is not None
        if inline or constant.nbytes <= INLINE_ALWAYS or not constant.dtype.bits:
            model.graph.initializer.append(tensor_proto(value.name, constant))
        else:
            tensor = model.graph.initializer.add(name=value.name, data_type=constant.dtype.onnx, dims=constant.shape)
            tensor.data_location = TensorProto.EXTERNAL
            artifact.external.append((tensor, constant))
    return artifact


def _name_outputs(graph: Graph) -> None:
    """Each output is made by a node, under the name the interface gives it."""
    taken: set[int] = {id(value) for value in graph.inputs}
    for index, (value, name) in enumerate(zip(list(graph.outputs), graph.output_names, strict=True)):
        if id(value) in taken or value.constant is not None or (value.captured and value.name != name):
            node = graph.add("Identity", [value], outputs=["output"])
            node.output.dtype, node.output.shape = value.dtype, value.shape
            graph.outputs[index] = value = node.output
            value.is_output = True
        taken.add(id(value))
    wanted = dict(zip(graph.output_names, graph.outputs, strict=True))
    for value in graph.values():
        if value.name in wanted and wanted[value.name] is not value:
            value.name = graph.fresh_name(f"{value.name}_inner")
    for name, value in wanted.items():
        value.name = name


def _assemble(graph: Graph, functions: list[onnx.FunctionProto]) -> ModelProto:
    tensors: dict[int, gs.Variable] = {}

    def tensor(value: Value | None) -> gs.Variable:
        if value is None:
            return gs.Variable.empty()
        if id(value) not in tensors:
            tensors[id(value)] = gs.Variable(value.name)
        return tensors[id(value)]

    nodes, names = [], set[str]()
    for node in graph.nodes:
        name = (
            node.name
            if node.name and node.name not in names
            else _unique(next((value.name for value in node.outputs if value.name), node.op), names)
        )
        names.add(name)
        made: list[Value | None] = list(node.outputs)
        if (node.domain, node.op) in SPARING:
            made = [value if value.uses or value.pinned else None for value in node.outputs]
            while made and made[-1] is None:
                made.pop()
        nodes.append(
            gs.Node(
                node.op,
                name,
                inputs=[tensor(v) for v in node.inputs],
                outputs=[tensor(v) for v in made],
                domain=node.domain or None,
            )
        )
    linked = gs.Graph(nodes, name=graph.name or "fused", opset=graph.opset, import_domains=_opsets(graph, functions))
    model = gs.export_onnx(linked, do_type_check=False)
    model.ClearField("producer_name")
    model.ClearField("producer_version")
    model.graph.ClearField("value_info")
    for proto, node in zip(model.graph.node, graph.nodes, strict=True):
        complete(proto, node)
        if node.domain in (FUSER, MICROSOFT) or not node.metadata or node.origin.sources != (proto.name,):
            _origin(proto, node.origin.module, node.origin.sources)
    model.functions.extend(functions)
    for value in graph.inputs:
        model.graph.input.append(_declared(graph, value, value.name))
    for value, name in zip(graph.outputs, graph.output_names, strict=True):
        model.graph.output.append(_declared(graph, value, name))
    _value_info(graph, model)
    return model


def _unique(stem: str, taken: set[str]) -> str:
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def _opsets(graph: Graph, functions: list[onnx.FunctionProto]) -> list[onnx.OperatorSetIdProto]:
    used = {node.domain for node in graph.nodes}
    found = {"": graph.opset, **graph.opsets}
    if MICROSOFT in used:
        found.setdefault(MICROSOFT, 1)
    if functions:
        found[FUSER] = 1
    return [onnx.helper.make_opsetid(domain, version) for domain, version in found.items()]


def _origin(proto: onnx.NodeProto, module: str, sources: tuple[str, ...]) -> None:
    present = {entry.key for entry in proto.metadata_props}
    for key, text in (("fuser.module", module), ("fuser.sources", ", ".join(sources))):
        if text and key not in present:
            proto.metadata_props.add(key=key, value=text)


def _declared(graph: Graph, value: Value, name: str) -> onnx.ValueInfoProto:
    """An input or output as the source declared it, with the dims that have become numbers since."""
    info = onnx.ValueInfoProto()
    if name in graph.interface:
        info.CopyFrom(graph.interface[name])
    elif value.dtype is not None:
        shape = None if value.shape is None else [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
        info.CopyFrom(onnx.helper.make_tensor_value_info(name, value.dtype.onnx, shape))
    info.name = name
    if info.type.HasField("tensor_type") and value.shape is not None:
        declared = info.type.tensor_type.shape.dim
        for dim, known in zip(declared, value.shape, strict=False):
            if len(declared) == len(value.shape) and isinstance(known, int) and not dim.HasField("dim_value"):
                dim.dim_value = known
    return info


def _value_info(graph: Graph, model: ModelProto) -> None:
    """Types and shapes of what nodes make, in terms of the inputs' dims, for those who read the file."""
    visible = {
        symbol for symbol, (value, _) in graph.dim_sources.items() if value.producer is None and "[" not in str(symbol)
    }
    outputs = set(graph.outputs)
    for node in graph.nodes:
        for value in node.outputs:
            if value in outputs or value.dtype in (None, DType.OTHER) or value.shape is None or not value.uses:
                continue
            assert value.dtype is not None
            shape = [d if isinstance(d, int) else str(d) if dims.symbols([d]) <= visible else None for d in value.shape]
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(value.name, value.dtype.onnx, shape))


def _stamp(model: ModelProto, graph: Graph, target: str, fusions: Mapping[str, int]) -> None:
    """What the source said of itself, and who fused it."""
    header = graph.header
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, name, getattr(header, name))
    model.ir_version = max(header.ir_version, 10 if model.functions else 8)
    model.graph.doc_string = header.graph.doc_string
    model.graph.metadata_props.extend(header.graph.metadata_props)
    ours = {
        "fuser.version": __version__,
        "fuser.target": target,
        "fuser.fusions": json.dumps(dict(sorted(fusions.items()))),
    }
    for entry in header.metadata_props:
        if entry.key not in ours:
            model.metadata_props.add(key=entry.key, value=entry.value)
    for key, text in ours.items():
        model.metadata_props.add(key=key, value=text)
