"""Model-local functions, put in the place of their calls."""

from collections.abc import Iterable
from typing import TypeAlias

import onnx
import onnx.checker
import onnx.inliner
import onnx.version_converter
from onnx import ModelProto

from fuser.errors import InputError

MAX_INLINED_NODES = 200_000  # of the functions of a file: some hundred times a large model's

FunctionName: TypeAlias = tuple[str, str, str]  # domain, name, overload


def inline(model: ModelProto) -> ModelProto:
    """The model with its local functions inlined, unless that would grow it past all use."""
    bodies = {(f.domain, f.name, f.overload): f.node for f in model.functions}
    sizes: dict[FunctionName, int] = {}
    open_: set[FunctionName] = set()

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        """The nodes these come to, bodies of control flow included."""
        total = 0
        for node in nodes:
            name = (node.domain, node.op_type, node.overload)
            total += function_size(name) if name in bodies else 1
            total += sum(size(body.node) for attribute in node.attribute for body in (attribute.g, *attribute.graphs))
        return total

    def function_size(name: FunctionName) -> int:
        if name in open_:
            raise InputError(f"the model's local functions call one another in a circle, through '{name[0]}.{name[1]}'")
        if name not in sizes:
            open_.add(name)
            sizes[name] = size(bodies[name])
            open_.remove(name)
        return sizes[name]

    try:
        expanded = size(model.graph.node)
        if expanded > MAX_INLINED_NODES:
            raise InputError(f"the model's local functions expand to more than {MAX_INLINED_NODES} nodes")
        _fill_defaults(model)
        _align_versions(model)
        inlined = onnx.inliner.inline_local_functions(model, convert_version=True)
    except RecursionError:
        raise InputError("the model's local functions are nested too deeply") from None
    except (onnx.checker.ValidationError, onnx.version_converter.ConvertError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"the model's local functions cannot be inlined: {reason}") from None
    if inlined.functions:
        raise InputError(f"the model's local function '{inlined.functions[0].name}' cannot be inlined")
    return inlined


def _align_versions(model: ModelProto) -> None:
    """The version of a domain says nothing of the model's own functions in it, but the inliner wants one everywhere."""
    own = {function.domain for function in model.functions} - {"", "ai.onnx"}
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for function in model.functions:
        for entry in function.opset_import:
            if entry.domain in own:
                entry.version = versions.setdefault(entry.domain, entry.version)


def _fill_defaults(model: ModelProto) -> None:
    """Gives every call the attributes that its function has a default for: onnx's inliner overlooks defaults."""
    defaults = {(f.domain, f.name, f.overload): f.attribute_proto for f in model.functions if f.attribute_proto}

    def fill(nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            given = {attribute.name for attribute in node.attribute}
            missing = defaults.get((node.domain, node.op_type, node.overload), ())
            node.attribute.extend(attribute for attribute in missing if attribute.name not in given)
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    fill(body.node)

    if defaults:
        for nodes in (model.graph.node, *(function.node for function in model.functions)):
            fill(nodes)
