"""From an ExportedProgram to a Graph: every node by its row of the table, weights held, sizes turned into dims."""

import copy
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, SymIntArgument, TensorArgument
from torch.fx import GraphModule
from torch.fx import Node as Call

from fuser.errors import InputError, UnsupportedOperator
from fuser.fx import attention, creation, elementwise, indexing, linear, reductions, shapes  # noqa: F401  enter their rows
from fuser.fx.export import TORCH
from fuser.fx.mutation import functional_forms
from fuser.fx.sizes import Sizes, dim_names
from fuser.fx.table import KEYWORDS, PLACEMENT, ROWS, At, dtype_of
from fuser.graph import FUSER, Graph, Origin, Value
from fuser.tensors import Held

OPSET = 23  # the first with Attention and RMSNormalization
MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION)
UNKNOWN = "there is no such operator in the table"
DECOMPOSITIONS = 4  # times that what an operator is decomposed into is looked at again


def import_program(
    program: ExportedProgram, *, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> Graph:
    """The Graph of a program that `torch.export` made: its tensors in and out in order, parameters as constants.

    Nothing is computed and no weight copied; weights may be on the meta device.

    Args:
        program: of any dialect; in-place operators are made functional first.
        inputs: names for the inputs that are tensors, otherwise those of the program's signature.
        outputs: likewise.

    Raises:
        UnsupportedOperator: an operator, or a form of one, that is outside the table; the text says where it stands.
        InputError: the program changes a buffer or an input.
    """
    return _Reader(_functional(program)).read(inputs, outputs)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place operators, and what the table lacks decomposed as far as torch knows how."""
    table: Mapping[Any, Any] | None = None
    for _ in range(DECOMPOSITIONS):
        missing = _missing(program.graph_module)
        if not missing:
            break
        if table is None:
            table = torch.export.default_decompositions()
        _refuse(
            program.graph_module, {target for target in missing if target not in table and not _is_composite(target)}
        )
        known = {target: table[target] for target in missing if target in table}
        program = copy.copy(program)
        # Checks of the inputs, which a graph has not; torch gets them wrong where forward takes *args.
        program._guards_code = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = program.run_decompositions(known)
        except Exception as error:  # torch raises some dozen types
            names = ", ".join(sorted(map(str, missing)))
            raise UnsupportedOperator(f"{names}: torch cannot decompose it: {str(error).splitlines()[0]}") from error
        if not known and not any(_is_mutable(target) for target in missing):
            break
    return program


def _refuse(module: GraphModule, targets: set[Any]) -> None:
    """Raises UnsupportedOperator for the first call of one of the targets."""
    for graph_module in module.modules():
        for call in graph_module.graph.nodes if isinstance(graph_module, GraphModule) else ():
            if call.op == "call_function" and call.target in targets:
                raise UnsupportedOperator(f"{call.target}: {UNKNOWN} (at {place_of(call)})")


def _is_composite(target: Any) -> bool:
    """Whether an operator is made of others, or is one of ATen in place."""
    if target.namespace == "aten" and _is_mutable(target):
        return True
    composite: bool = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return composite


def _is_mutable(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _missing(module: GraphModule) -> set[Any]:
    """The operators that make tensors and have no row."""
    found: set[Any] = set()
    for graph_module in module.modules():
        if isinstance(graph_module, GraphModule):
            functional = functional_forms(graph_module)
            found.update(
                call.target
                for call in graph_module.graph.nodes
                if call.op == "call_function"
                and call not in functional
                and isinstance(call.target, torch._ops.OpOverload)
                and str(call.target) not in ROWS
                and (_makes_tensors(call) or _is_mutable(call.target))
            )
    return found


def _makes_tensors(call: Call) -> bool:
    value = call.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value)
    )


class _Reader:
    """One program on its way into a graph."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph = Graph(type(program.graph_module).__name__, OPSET)
        self.sizes = Sizes(dim_names(program))
        self.constants: dict[Any, Value] = {}
        self.at = At(self.graph, self.sizes, self.constants)
        self.modules: dict[str, Origin] = {}

    def read(self, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Graph:
        calls = list(self.program.graph_module.graph.nodes)
        placeholders = [call for call in calls if call.op == "placeholder"]
        values: dict[Call, Any] = {}
        specs = self.program.graph_signature.input_specs
        self.graph.names.update(call.name for call in placeholders)
        for call, spec in zip(placeholders, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
                values[call] = self._input(call, inputs)
        if inputs is not None and len(inputs) != len(self.graph.inputs):
            raise InputError(f"{len(inputs)} names are given for {len(self.graph.inputs)} inputs")
        for call, spec in zip(placeholders, specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT:
                values[call] = self._constant(call, spec.target)
            elif call not in values:
                values[call] = call.meta.get("val")
        results = self._run(self.program.graph_module, values)
        self._outputs(results, outputs)
        self._check_mutations(
            {spec.target: values[call] for call, spec in zip(placeholders, specs, strict=True)}, results
        )
        return self.graph

    def _check_mutations(self, held: Mapping[str | None, Any], results: Sequence[Any]) -> None:
        """Refuses a change of an input, or of a buffer that is read before: the next call would see it.

        A buffer that is written before it is read keeps nothing from one call to the next.
        """
        changes = [spec for spec in self.program.graph_signature.output_specs if spec.kind in MUTATIONS]
        read = _sources(results) if changes else set()
        for spec in changes:
            before = held.get(spec.target) if spec.kind is OutputKind.BUFFER_MUTATION else None
            if isinstance(before, Value) and before not in read:
                continue
            kind = spec.kind.name.lower().removesuffix("_mutation").replace("_", " ")
            calls = [call for call in self.program.graph.nodes if call.name == spec.arg.name]
            place = f" (at {place_of(calls[0])})" if calls and calls[0].op == "call_function" else ""
            raise InputError(f"the module changes its {kind} '{spec.target}'{place}; give the new value as an output")

    def _input(self, call: Call, names: Sequence[str] | None) -> Value:
        index, tensor = len(self.graph.inputs), call.meta["val"]
        name = call.name if names is None or index >= len(names) else names[index]
        self.graph.names.add(name)
        value = Value(name, dtype_of(tensor.dtype), self.sizes.shape(tensor.shape))
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, sympy.Symbol):
                self.graph.define(dim, value, axis)
        self.graph.inputs.append(value)
        return value

    def _constant(self, call: Call, target: str | None) -> Any:
        """A parameter, buffer or constant of the module; one that has two names there is one constant."""
        held = self.program.state_dict.get(target, self.program.constants.get(target))
        if not isinstance(held, torch.Tensor):
            return held
        place = held.data_ptr() if not held.is_meta and type(held) in (torch.Tensor, torch.nn.Parameter) else 0
        key = (place or id(held), held.dtype, tuple(held.shape), held.stride())
        if key not in self.constants:
            constant = Held(held, target or call.name)
            self.constants[key] = Value(self.graph.fresh_name(target or call.name), constant.dtype, constant.shape)
            self.constants[key].constant = constant
        return self.constants[key]

    def _run(self, module: GraphModule, values: dict[Call, Any]) -> Any:
        """The outputs of a graph of the program, its placeholders given."""
        functional = functional_forms(module)
        for call in module.graph.nodes:
            if call.op == "placeholder" or call in values:
                continue
            if call.op == "output":
                return torch.fx.node.map_arg(call.args[0], lambda one: values[one])
            if call.op == "get_attr":
                values[call] = _attribute(module, call.target)
                continue
            try:
                form = functional.get(call)
                values[call] = self._call(call, values, form.row if form is not None else str(call.target))
                if form is not None:  # whoever reads the tensor from here on reads what was written
                    values.update((one, values[call]) for one in form.tensor if one in values)
            except (UnsupportedOperator, InputError) as error:
                raise type(error)(f"{call.target}: {error} (at {place_of(call)})") from None
        raise AssertionError("a graph of a program ends with its output")

    def _call(self, call: Call, values: dict[Call, Any], name: str) -> Any:
        """What the row of that name makes of a call's arguments."""
        target = call.target
        if target is operator.getitem:
            whole, index = call.args
            assert isinstance(whole, Call) and isinstance(index, int)
            return values[whole][index]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._higher_order(call, values)
        if not _makes_tensors(call):  # sizes, and checks of them
            result = call.meta.get("val")
            return self.sizes.of(result) if isinstance(result, (int, torch.SymInt)) else result
        row = ROWS.get(name)
        if row is None:
            raise UnsupportedOperator(UNKNOWN)
        keywords = KEYWORDS[name]
        given = {}
        for key, item in call.kwargs.items():
            if keywords is None or key in keywords:
                given[key] = _argument(item, values)
            elif key not in PLACEMENT and item is not None:
                raise UnsupportedOperator(f"its argument {key}={item} is not supported")
        arguments = [_argument(item, values) for item in call.args]
        self.at.enter(call.name, self._origin(call), call.meta["val"])
        outcome = row(self.at, *arguments, **given)
        self.at.leave(outcome)
        return outcome

    def _higher_order(self, call: Call, values: dict[Call, Any]) -> Any:
        """A graph in the graph whose context says nothing to inference is read in its place."""
        name, arguments = str(call.target), list(call.args)
        context = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
        if context is None:
            raise UnsupportedOperator("control flow that depends on data is not supported")
        if name == "wrap_with_autocast" and arguments[2]:
            raise UnsupportedOperator("autocast is not supported; convert the module instead")
        body = _argument(arguments[context], values)
        assert isinstance(body, GraphModule)
        inner = [one for one in body.graph.nodes if one.op == "placeholder"]
        given = [_argument(item, values) for item in arguments[context + 1 :]]
        return self._run(body, dict(zip(inner, given, strict=True)))

    def _origin(self, call: Call) -> Origin:
        return Origin((call.name,), module_of(call))

    def _outputs(self, results: Any, names: Sequence[str] | None) -> None:
        specs = self.program.graph_signature.output_specs
        kept = [
            (spec.arg.name, result)
            for spec, result in zip(specs, results, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT and isinstance(spec.arg, (TensorArgument, SymIntArgument))
        ]
        if names is not None and len(names) != len(kept):
            raise InputError(f"{len(names)} names are given for {len(kept)} outputs")
        for index, (name, result) in enumerate(kept):
            if not isinstance(result, Value):
                node = self.graph.add("Dims", [], {"dims": result}, domain=FUSER, outputs=[name])
                result = node.output
            result.is_output = True
            self.graph.outputs.append(result)
            self.graph.output_names.append(name if names is None else names[index])


def _sources(results: Sequence[Any]) -> set[Value]:
    """The values that results are computed from, themselves among them."""
    found: set[Value] = set()
    pending = [result for result in results if isinstance(result, Value)]
    while pending:
        value = pending.pop()
        if value not in found:
            found.add(value)
            inputs = value.producer.inputs if value.producer is not None else ()
            pending.extend(one for one in inputs if one is not None)
    return found


def _argument(item: Any, values: Mapping[Call, Any]) -> Any:
    """An argument with values and dims in the places of nodes."""
    if isinstance(item, Call):
        return values[item]
    if isinstance(item, (list, tuple)):
        return [_argument(part, values) for part in item]
    return item


def _attribute(module: GraphModule, path: Any) -> Any:
    found: Any = module
    for part in str(path).split("."):
        found = getattr(found, part)
    return found


def module_of(call: Call) -> str:
    """The path of the module that a node stands in: `model.layers.3.self_attn`."""
    stack = call.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = next(reversed(stack.values()))[0]
    return path


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def place_of(call: Call) -> str:
    """Where a node stands, for people: module path and source line."""
    frames = _FRAME.findall(call.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in frames if not file.startswith((TORCH, "<"))]
    parts = [f"module '{module_of(call)}'"] + [f"{file}:{line}" for file, line in (own or frames)[-1:]]
    return ", ".join(parts)
