"""`fuser.compile(module)`: a module that runs through its fused graph, and is otherwise the module it was made of."""

import copy
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor, nn
from torch.export import ExportedProgram

from fuser.api import check_output
from fuser.compilation import BACKENDS, Compilation, Options
from fuser.diff.comparison import Diff, of_fused
from fuser.errors import InputError, UsageError
from fuser.exporter import export
from fuser.graph import Graph
from fuser.pipeline import Progress
from fuser.pretrained import Pretrained, is_pretrained
from fuser.report import Report, explanation_text

Module = TypeVar("Module", bound=nn.Module)


@overload
def compile(
    module: ExportedProgram, *, backend: str = "auto", verify: bool = True, progress: Progress | None = None
) -> nn.Module: ...
@overload
def compile(
    module: Module,
    example_inputs: Any = None,
    *,
    dynamic: bool | Mapping[str, Any] | Sequence[Any] = True,
    backend: str = "auto",
    verify: bool = True,
    progress: Progress | None = None,
) -> Module: ...
def compile(
    module: Any,
    example_inputs: Any = None,
    *,
    dynamic: bool | Mapping[str, Any] | Sequence[Any] = True,
    backend: str = "auto",
    verify: bool = True,
    progress: Progress | None = None,
) -> Any:
    """A module with the same signature, parameters, inputs and outputs as `module`, run through its fused graph.

    It is an instance of the module's own class and shares its parameters; `.graph`, `.report`, `.explain()` and
    `.save(path)` are added. It is for inference: nothing it gives requires a gradient, dropout is off. Without example
    inputs it is compiled when it is first called. Inputs of another form (other dtypes, ranks, keywords) are compiled anew,
    and so is everything once parameters have been written to, loaded or converted.

    Args:
        module: a module; or an `ExportedProgram`, which becomes a module of the form that it was exported for, its sizes as
            dynamic as it says.
        example_inputs: a tuple of positional arguments, a mapping of keyword arguments, or one tensor.
        dynamic: whether sizes may differ from the example's (where the model allows it), or `dynamic_shapes` as
            `torch.export.export` takes them. A size of 0 or 1 in the example is fixed.
        backend: `torch`: fused nodes by torch's kernels; `reference`: by their reference functions; `auto`: the fastest.
        verify: prove each rewrite numerically, and compare the result with the module on the example inputs.
        progress: called with the name of each stage as it begins.

    Raises:
        UsageError: an unknown backend, or no module.
        InputError: the module cannot be captured: control flow that depends on data, or inputs that do not fit it.
        UnsupportedOperator: it has an operator that fuser does not know; the text names operator, module and line.
        VerificationError: the fused graph and the module disagree.
    """
    is_program = isinstance(module, ExportedProgram)
    if not is_program and not isinstance(module, nn.Module):
        raise UsageError(
            f"fuser.compile takes an nn.Module, got {type(module).__name__}; for a file there is fuser.load"
        )
    if backend not in ("auto", *BACKENDS):
        raise UsageError(f"there is no backend '{backend}'; backends are auto, {', '.join(BACKENDS)}")
    options = Options(dynamic, backend, verify, progress or (lambda stage: None))
    if is_program:
        if module.example_inputs is None:
            raise InputError("the program has no example inputs; fuser.compile its module() with some")
        compilation = Compilation(module.module(), options, module)
        compilation.variant(*module.example_inputs)
        return _twin(compilation.module, compilation)
    if example_inputs is None and is_pretrained(module):
        pretrained = Pretrained(module, options)
        _ = pretrained.first
        return _twin(module, pretrained)
    compilation = Compilation(module, options)
    if example_inputs is not None:
        compilation.variant(*_arguments(example_inputs))
    return _twin(module, compilation)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise UsageError(
        "example_inputs must be a tuple of arguments, a mapping of keyword arguments or a tensor, "
        f"got {type(example_inputs).__name__}"
    )


def _twin(module: Module, compilation: Compilation) -> Module:
    """An instance of a subclass of the module's class that shares its parameters, buffers and submodules.

    What hooks of the module do is a part of what is compiled; the twin has hooks of its own.
    """
    cls = type(module)

    @functools.wraps(cls.forward)
    def forward(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        return self._compilation.run(args, kwargs)

    names = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    kind = type(cls.__name__, (Compiled, cls), names)
    twin: Module = object.__new__(kind)
    nn.Module.__init__(twin)
    hooks = {name for name in twin.__dict__ if name.endswith(("hooks", "_with_kwargs", "_always_called"))}
    twin.__dict__.update({name: item for name, item in module.__dict__.items() if name not in hooks})
    twin.__dict__.update(training=False, _compilation=compilation)
    return twin


class Compiled(nn.Module):
    """What a compiled module has besides what its class gives it."""

    _compilation: "Compilation"

    @property
    def graph(self) -> Graph:
        """The fused graph of the first form that was compiled."""
        return self._compilation.first.graph

    @property
    def report(self) -> Report:
        """What was fused, what was not and why, and how the result was verified."""
        return self._compilation.first.report

    def explain(self, *, everything: bool = False) -> str:
        """By layer what was fused, and why the rest was not, the likeliest reasons first."""
        explanation = self.report.explanation
        assert explanation is not None
        return explanation_text(explanation, everything=everything)

    def diff(self) -> Diff:
        """What was fused, before and after, as `FusedModel.diff` gives it."""
        first = self._compilation.first
        return of_fused(first.read, first.graph, first.report)

    def save(self, path: str | os.PathLike[str], *, target: str = "ort") -> None:
        """Writes the fused graph as an ONNX file, whole or not at all.

        Raises:
            UsageError: `path` cannot be an output.
            OutputError: it cannot be written.
        """
        check_output(path, ())
        first = self._compilation.first
        export(first.graph.clone(), target, first.report.fused).write(Path(path))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        """A copy of the module, compiled for itself when it is first called."""
        copied = self._compilation.renewed(copy.deepcopy(self._compilation.module, memo))
        memo[id(self)] = twin = _twin(copied.module, copied)
        assert isinstance(twin, Compiled)
        return twin

    def __reduce__(self) -> Any:
        raise UsageError("a compiled module is not pickled; save its state_dict(), or its graph by .save(path)")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Compiled":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._compilation.forget()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().load_state_dict(*args, **kwargs)
        self._compilation.forget()
        return found

    def train(self, mode: bool = True) -> "Compiled":
        if mode:
            raise UsageError("a compiled module is for inference; train the module it was made of")
        return self
