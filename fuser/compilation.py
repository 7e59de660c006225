"""What `fuser.compile` makes of a module: one variant for each form of arguments, each a fused graph that torch runs."""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind, SymIntArgument
from torch.utils import _pytree as pytree

from fuser.checking import relative_error
from fuser.errors import InputError, UsageError, VerificationError
from fuser.fx import evaluating, export_module, import_program
from fuser.graph import Graph
from fuser.layers import steps
from fuser.pipeline import Progress, canonicalized, outlined, rewritten, stage, weight_bytes
from fuser.quantized import unrounded
from fuser.report import Report
from fuser.runtime.executor import Executor
from fuser.runtime.program import Kernel
from fuser.runtime.torch_kernels import KERNELS
from fuser.verification import TOLERANCE, Verification, coarsest, too_large

BACKENDS: dict[str, Mapping[str, Kernel]] = {"torch": KERNELS, "reference": {}}
AUTO = "torch"
VARIANTS = 8  # forms of inputs that are compiled before another one is an error


@dataclass
class Options:
    """What `compile` was asked for."""

    dynamic: Any
    backend: str
    verify: bool
    note: Progress
    is_run: bool = True  # whether the graph is to be run by torch; else it is only where it is compared


@dataclass
class Linked:
    """A fused graph, what was done to make it, and what runs it."""

    graph: Graph
    report: Report
    engine: Executor | None  # None where weights have no elements
    read: Graph  # as it was captured, without weights

    @property
    def executor(self) -> Executor:
        """What runs the graph.

        Raises:
            InputError: there is nothing to run it with.
        """
        if self.engine is None:
            raise InputError("the model was compiled without its weights (on the meta device): it can be read, not run")
        return self.engine


@dataclass
class Variant(Linked):
    """A module compiled for one form of arguments."""

    outputs: tuple[Any, ...]  # what is no tensor, with a place for what is
    out_spec: pytree.TreeSpec

    def __call__(self, leaves: Sequence[Any]) -> Any:
        made = iter(self.executor(*(leaf for leaf in leaves if isinstance(leaf, Tensor))))
        results = [int(next(made)) if x is Place.SIZE else next(made) if x is Place.TENSOR else x for x in self.outputs]
        return pytree.tree_unflatten(results, self.out_spec)


class Place(Enum):
    """What is to be in an output's place."""

    TENSOR = auto()
    SIZE = auto()


def _place(argument: Any) -> Any:
    if isinstance(argument, ConstantArgument):
        return argument.value
    return Place.SIZE if isinstance(argument, SymIntArgument) else Place.TENSOR


@dataclass
class Compilation:
    """A module's compiled variants, by the form of their arguments."""

    module: nn.Module
    options: Options
    program: ExportedProgram | None = None  # one that was exported before, for the first form that is compiled
    variants: dict[Hashable, list[Variant]] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)  # of the parameters, when they were compiled

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.module.forward)

    @property
    def first(self) -> Linked:
        for variants in self.variants.values():
            return variants[0]
        raise UsageError("the module is not compiled yet: it was given no example inputs, and has not been called")

    def forget(self) -> None:
        """Drops what was compiled: parameters have moved or changed."""
        self.variants.clear()

    def _watch(self) -> None:
        """Remembers the parameters as they are: weights that are joined, folded or looked at are not read again."""
        self.versions = [(p, p._version) for p in self.module.parameters() if not p.is_inference()]

    def _follow(self) -> None:
        """Drops what was compiled of parameters that have been written to since."""
        if any(parameter._version != version for parameter, version in self.versions):
            self.versions = []
            self.forget()

    def renewed(self, module: nn.Module) -> "Compilation":
        """The same for another module of the kind, with nothing compiled yet."""
        return type(self)(module, self.options)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns for some arguments."""
        self._follow()
        leaves, key = self._form(args, kwargs)
        for variant in self.variants.get(key, ()):
            try:
                return variant(leaves)
            except InputError:  # other sizes
                continue
        return self.variant(args, kwargs)(leaves)

    def _form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Hashable]:
        """The arguments' leaves, and what of them one compiled variant serves."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        form = tuple([(x.dtype, x.dim()) if isinstance(x, Tensor) else x for x in leaves])
        return leaves, (spec, form)

    def variant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """The module compiled for arguments like these.

        Raises:
            InputError: they do not fit the module, or it has been compiled for too many forms.
        """
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"{type(self.module).__name__}.forward{self.signature}: {error}") from None
        _, key = self._form(args, kwargs)
        if sum(map(len, self.variants.values())) >= VARIANTS:
            raise InputError(f"{type(self.module).__name__} was compiled for {VARIANTS} forms of inputs already")
        made = self._compiled(args, kwargs)
        self.variants.setdefault(key, []).append(made)
        return made

    def _exported(self, args: tuple[Any, ...], kwargs: dict[str, Any], report: Report) -> ExportedProgram:
        """The program of the module for arguments like these."""
        if self.program is not None:
            given, self.program = self.program, None
            return given
        with stage(report, "export", self.options.note):
            return export_module(self.module, args, kwargs, self.options.dynamic)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        report = Report(type(self.module).__name__, self.options.backend)
        self._watch()
        program = self._exported(args, kwargs, report)
        made = linked(program, report, self.options)
        specs = program.graph_signature.output_specs
        outputs = tuple(_place(spec.arg) for spec in specs if spec.kind is OutputKind.USER_OUTPUT)
        out_spec = program.call_spec.out_spec
        assert out_spec is not None
        variant = Variant(made.graph, report, made.engine, made.read, outputs, out_spec)
        if self.options.verify:
            with stage(report, "verify", self.options.note):
                leaves = pytree.tree_leaves((args, kwargs))
                cases = {"example": (lambda: self.module(*args, **kwargs), lambda: variant(leaves))}
                report.verification = compared(self.module, made, cases)
        return variant


def linked(
    program: ExportedProgram, report: Report, options: Options, *, inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Linked:  # fmt: skip
    """A program's fused graph, and what runs it; `inputs` and `outputs` are names for the graph's."""
    with stage(report, "read", options.note):
        graph = import_program(program, inputs=inputs, outputs=outputs)
        report.nodes_before = len(graph.nodes)
        report.weights_bytes_before = weight_bytes(graph)
        before, read = steps(graph), outlined(graph)
    canonicalized(graph, report, options.note)
    rewritten(graph, before, report, options.note, verify=options.verify)
    report.nodes_after, report.weights_bytes_after = len(graph.nodes), weight_bytes(graph)
    if not _has_elements(graph):
        return Linked(graph, report, None, read)
    if not options.is_run and (too_large(report.weights_bytes_after) or not options.verify):
        return Linked(graph, report, None, read)
    with stage(report, "link", options.note):
        executor = Executor(graph, kernels=BACKENDS[AUTO if options.backend == "auto" else options.backend])
    return Linked(graph, report, executor, read)


def _has_elements(graph: Graph) -> bool:
    return all(value.constant is None or value.constant.is_known for value in graph.constants())


Run = Callable[[], Any]


@unrounded()
def compared(module: nn.Module, made: Linked, cases: Mapping[str, tuple[Run, Run]]) -> Verification:
    """Compares what a module and what its fused graph give, case by case.

    Raises:
        VerificationError: they differ by more than the rounding of the coarsest type they compute in.
    """
    if not _has_elements(made.graph):
        return Verification(skipped="its weights have no elements; every rewrite was proven by itself")
    if skipped := too_large(weight_bytes(made.graph)):
        return Verification(skipped=skipped)
    found = Verification(tolerance=TOLERANCE.get(coarsest(made.graph), 2e-5))
    for name, (original, fused) in cases.items():
        try:
            with evaluating(module):
                expected = pytree.tree_leaves(original())
        except Exception as error:  # whatever a module raises
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{type(module).__name__} itself fails on {name} inputs: {told}") from error
        pairs = zip(pytree.tree_leaves(fused()), expected, strict=True)
        errors = [relative_error(a, b) for a, b in pairs if isinstance(b, Tensor)]
        found.cases[name] = worst = max(errors, default=0.0)
        if not worst <= found.tolerance:
            raise VerificationError(
                f"{type(module).__name__}: fused, it differs from the module by {worst:.1e} on {name}, "
                f"more than {found.tolerance:.1e}"
            )
    return found
