"""The Python API: `fuser.fuse(model)` and the FusedModel it returns."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx

from fuser.codegen import emit
from fuser.codegen.compose import compose
from fuser.codegen.kernel import element
from fuser.codegen.kv_groups import kv_group_of
from fuser.codegen.linear import MOST_TOKENS
from fuser.codegen.plan import REGIMES, Launch, plan
from fuser.codegen.program import Program
from fuser.diff.comparison import Diff, of_fused
from fuser.errors import UsageError, VerificationError
from fuser.explanation import Explanation
from fuser.exporter import Artifact, export
from fuser.formats import Format
from fuser.graph import FUSER, Graph
from fuser.importer import external_files, from_proto, read_model
from fuser.layers import steps
from fuser.lowering import TARGETS
from fuser.pipeline import Progress, canonicalized, input_roles, outlined, quantization, rewritten, stage, weight_bytes
from fuser.quantized import unrounded
from fuser.quantizing import Choices, choices
from fuser.report import Report, explanation_text
from fuser.runtime.executor import Executor
from fuser.tensors import to_array, to_tensor
from fuser.verification import Reference, Role, Verification, coarsest, compare, reference_of, too_large

EXACT = 1  # the last accuracy level at which ONNX Runtime computes in float32
PREFILL_TOKENS = 2048  # of the prefill step that is emitted


class FusedModel:
    """A fused model: its graph, its report, and the file it can be saved as."""

    def __init__(
        self, graph: Graph, report: Report, artifact: Artifact, sources: Collection[Path], read: Graph
    ) -> None:
        self.graph = graph
        self.report = report
        self.read = read  # the graph as it was read, without its weights
        self.sources = sources  # the files it was read from
        self._artifact = artifact

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to `path`, whole or not at all; an existing file survives any failure.

        Raises:
            UsageError: `path` is the source model itself or its weights, or a directory.
            OutputError: the file cannot be written.
        """
        check_output(path, self.sources)
        self._artifact.write(path, keep=self.sources)

    def emit_triton(
        self, folder: str | os.PathLike[str], *, dtype: str = "bf16", tokens: int = 1, context: int = 1024
    ) -> None:
        """Writes the Triton kernels that the model becomes, a file each, with tests and an index of the launches.

        Args:
            folder: new, empty, or of an earlier emission, which is replaced; it appears whole or not at all.
            dtype: bf16, fp16 or fp32.
            tokens: of a decode step, at most 64; kernels for prompts are written beside its own.
            context: keys of a sequence that the index counts bytes for.

        Raises:
            UsageError: the folder holds something else; an unknown dtype.
            UnsupportedOperator: a node that no step over pages computes.
            OutputError: the folder cannot be written.
        """
        prefill = compose(self.graph, dtype=dtype, tokens=PREFILL_TOKENS, decode=False)
        emit.emit(folder, [self.program(dtype=dtype, tokens=tokens), prefill], context=context)

    def program(self, *, dtype: str = "bf16", tokens: int = 1, kv_cache: str = "auto") -> Program:
        """The kernels of a decode step over paged caches, for at most `tokens` (1 to 64) sequences of a new token each.

        Args:
            kv_cache: the element type of keys and values: auto (that of dtype), int8, or int8:GROUP.

        Raises:
            UsageError: another number of tokens, an unknown dtype or kind of cache.
            UnsupportedOperator: a node that no step over pages computes.
        """
        kv_group = kv_group_of(kv_cache, dtype)
        return compose(self.graph, dtype=dtype, tokens=tokens, decode=True, kv_group=kv_group)

    def explain(self, *, everything: bool = False) -> str:
        """By layer what was fused, and why the rest was not, the likeliest reasons first.

        Args:
            everything: every reason and every place of it, not only the first ones.
        """
        assert self.report.explanation is not None
        return explanation_text(self.report.explanation, everything=everything)

    def diff(self) -> Diff:
        """What was fused, before and after: `.save("diff.html")` (or .svg, .txt, .json), `.text()`, or shown in a notebook."""
        return of_fused(self.read, self.graph, self.report)


def check_output(path: str | os.PathLike[str], sources: Collection[Path]) -> None:
    """Refuses an output that is an input, or a directory, before any work is done."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UsageError(f"'{path}' is a directory; give the name of the file to write")
        if path.exists() and any(source.exists() and path.samefile(source) for source in sources):
            raise UsageError(f"'{path}' is the input; write to another file")
        if path.exists() and not path.is_file():
            raise UsageError(f"'{path}' is not a regular file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"'{path.parent}' is not a folder")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be an output: {error.strerror}") from None


def check_emission(folder: str | os.PathLike[str], *, dtype: str, tokens: int) -> None:
    """Refuses what `FusedModel.emit_triton` would, before any work is done."""
    emit.check(Path(folder))
    element(dtype)
    if not 1 <= tokens <= MOST_TOKENS:
        raise UsageError(f"a decode step takes 1 to {MOST_TOKENS} tokens, not {tokens}")


def fuse(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    target: str = "ort",
    dims: Mapping[str, int] | None = None,
    verify: bool = True,
    quantize: str | Format | None = None,
    overrides: Mapping[str, str | Format | None] | None = None,
    keep: Sequence[str] = (),
    head: bool = False,
    accuracy_level: int | None = None,
    clip: str | None = None,
    calibration: Any = None,
    method: str = "gptq",
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> FusedModel:
    """Fuses a transformer exported to ONNX, its weights quantized first where that is asked for.

    Args:
        model: a file (opset 13 or newer; external data is found beside it), or a ModelProto with its data inside.
        target: `ort`: operators of stock ONNX Runtime; `functions`: fused nodes with bodies of standard operators.
        dims: sizes for named dims of the inputs, e.g. `{"batch": 1}`.
        verify: prove each rewrite numerically, and compare original and result in ONNX Runtime; a quantized result is
            compared with the quantized original as torch computes it: what rounding weights changes is no error.
        quantize: a format for weights, as of `fuser.quantize`: `int4`, `int8:channel`, `nf4:64`, `w8a8`, ...
        accuracy_level: of the file's MatMulNBits, 0 to 4; by default the source's own, or 0. From 2 on ONNX Runtime may round
            their inputs (4: to eight bits), which is faster on CPUs, and which the comparison leaves out.
        overrides, keep, head: which weights take another format or none, as of `fuser.quantize`.
        clip, calibration, method, tokenizer: how weights are rounded, as of `fuser.quantize`.
        progress: called with the name of each stage as it begins.

    Raises:
        InputError: the model cannot be read or is not supported.
        UsageError: an unknown target, dim or format.
        VerificationError: original and fused model disagree.
    """
    path = _path(model)
    report, note = _report(path, target), progress or (lambda stage: None)
    chosen = None
    if quantize is not None:
        chosen = choices(
            quantize, overrides=overrides, keep=keep, head=head, clip=clip, calibration=calibration, method=method,
            tokenizer=tokenizer,
        )  # fmt: skip
    elif overrides or keep or head or clip or calibration is not None:
        raise UsageError(
            "overrides, keep, head, clip and calibration say how weights are quantized: give quantize, a format, as well"
        )
    if accuracy_level not in (None, *range(5)):
        raise UsageError(f"an accuracy level is 0 to 4, not {accuracy_level}")
    made = _rewritten(model, dims, verify, report, note, chosen)
    graph, level = made.graph, made.accuracy_level if accuracy_level is None else accuracy_level
    with stage(report, "export", note):
        artifact = export(graph, target, report.fused)
    report.notes = artifact.notes
    report.nodes_after = len(artifact.model.graph.node)
    report.weights_bytes_after = artifact.weight_bytes
    fused = FusedModel(graph, report, artifact, made.sources, made.read)
    if not verify:
        report.verification = Verification(skipped="--no-verify")
        artifact.set_accuracy_level(level)
        return fused
    with stage(report, "verify", note):
        skipped = made.unfit or too_large(max(report.weights_bytes_before, report.weights_bytes_after))
        if skipped:
            report.verification = Verification(skipped=skipped)
        else:
            source = str(path) if path is not None else _bytes(model)
            reference = _reference(source, made.original, graph)
            report.verification = compare(reference, artifact, made.roles, coarsest(graph))
    artifact.set_accuracy_level(level)
    if not report.verification.skipped and not report.verification.passed:
        cases = ", ".join(f"{name} {error:.1e}" for name, error in report.verification.cases.items())
        tolerance = f"{report.verification.tolerance:.1e}"
        raise VerificationError(
            f"the fused model differs from the original by more than {tolerance} ({cases}); nothing was written"
        )
    return fused


def explain(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    target: str = "ort",
    dims: Mapping[str, int] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Explanation:
    """Says by layer what `fuse` would fuse, and why it would not fuse the rest; takes and raises what `fuse` does.

    Rewrites are proven as `fuse` proves them; nothing is compared end to end, for nothing is made to be run.
    """
    report = _report(_path(model), target)
    _rewritten(model, dims, verify, report, progress or (lambda stage: None), compared=False)
    assert report.explanation is not None
    return report.explanation


def plan_kernels(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    regime: str = "decode",
    dims: Mapping[str, int] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> list[Launch]:
    """The kernel launches that a model becomes once it is fused; takes and raises what `fuse` does.

    Args:
        regime: `decode`: at most 64 tokens at once; `prefill`: more.
    """
    if regime not in REGIMES:
        raise UsageError(f"there is no regime '{regime}'; regimes are {', '.join(REGIMES)}")
    report = _report(_path(model), "functions")
    made = _rewritten(model, dims, verify, report, progress or (lambda stage: None), compared=False)
    return plan(made.graph, "prefill" if regime == "prefill" else "decode")


def _path(model: str | os.PathLike[str] | onnx.ModelProto) -> Path | None:
    return None if isinstance(model, onnx.ModelProto) else Path(model)


def _report(path: Path | None, target: str) -> Report:
    if target not in TARGETS:
        raise UsageError(f"there is no target '{target}'; targets are {', '.join(TARGETS)}")
    return Report(str(path) if path else "ModelProto", target)


@dataclass(frozen=True)
class _Made:
    """A fused graph; the graph as it was read, without weights; the one that it is held against where that is not its source;
    the files it was read from; the roles of its inputs, or why there are none; the accuracy level of the source's products
    with codes."""

    graph: Graph
    read: Graph
    original: Graph | None
    sources: Collection[Path]
    roles: list[Role]
    unfit: str
    accuracy_level: int


def _rewritten(
    model: str | os.PathLike[str] | onnx.ModelProto,
    dims: Mapping[str, int] | None,
    verify: bool,
    report: Report,
    note: Progress,
    chosen: Choices | None = None,
    *,
    compared: bool = True,
) -> _Made:
    path = _path(model)
    with stage(report, "read", note):
        if isinstance(model, onnx.ModelProto):
            proto = onnx.ModelProto()
            proto.CopyFrom(model)
        else:
            proto = read_model(Path(model))
        report.nodes_before = len(proto.graph.node)
        sources = {path, *external_files(proto, path.parent)} if path else set()
        graph = from_proto(proto, path.parent if path else Path(), dims, path)
        report.weights_bytes_before = weight_bytes(graph)
        before, read = steps(graph), outlined(graph)
    level = max((node.attributes.get("accuracy_level", 0) for node in graph.nodes), default=0)
    canonicalized(graph, report, note)
    found, unfit = input_roles(graph) if verify and compared else ([], "")
    if chosen is not None:
        graph = quantization(graph, chosen, report, note)
    original = graph.clone() if chosen is not None or level > EXACT else None
    rewritten(graph, before, report, note, verify=verify)
    return _Made(graph, read, original, sources, found, unfit, level)


def _reference(source: str | bytes, quantized: Graph | None, fused: Graph) -> str | bytes | Reference:
    """What a fused model is held against: its source, or the graph that was quantized, as torch computes it.

    Where activations are rounded, results are as near as those without that rounding: one may fall to the other side.
    """

    def outputs(executor: Executor, given: Mapping[str, Any]) -> dict[str, Any]:
        made = executor(*(to_tensor(given[value.name]) for value in fused.inputs))
        return {name: to_array(x) for name, x in zip(fused.output_names, made, strict=True)}

    rounds = any(node.is_a("fake_quantize", FUSER) for node in fused.nodes)
    if quantized is None and not rounds:
        return source
    original = cache(lambda: reference_of(source))  # a source that cannot be run is told of by the comparison
    run = (lambda given: original().run(given)) if quantized is None else partial(outputs, Executor(quantized))
    again = partial(outputs, Executor(fused))
    return Reference(run, unrounded()(again), 1.0) if rounds else Reference(run, again)


def _bytes(model: str | os.PathLike[str] | onnx.ModelProto) -> bytes:
    assert isinstance(model, onnx.ModelProto)
    data: bytes = model.SerializeToString()
    return data
