"""`fuse model.onnx -o fused.onnx`, and `fuse explain model.onnx`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fuser.cli.console import (
    DEFAULT,
    HELP,
    Calibrate,
    CalibrationTokens,
    Clip,
    DefaultCommand,
    Dims,
    Method,
    Model,
    Progress,
    Tokenizer,
    Verbose,
    app,
    failing,
    lines,
    sizes,
)
from fuser.errors import ExpectationError, UsageError
from fuser.version import __version__


@dataclass(frozen=True)
class Emission:
    """Where kernels are to be written, and for what."""

    folder: Path | None
    dtype: str
    tokens: int


@dataclass(frozen=True)
class Quantization:
    """Which weights become codes, as they are to be said to `fuser.fuse`."""

    quantize: str | None
    keep: list[str]
    overrides: dict[str, str]
    head: bool
    accuracy_level: int | None
    clip: str | None
    method: str


@dataclass(frozen=True)
class TextFiles:
    """What weights are calibrated with, and what quality is measured on."""

    calibrate: Path | None
    text: Path | None
    tokenizer: Path | None
    tokens: int


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fuse {__version__}")
        raise typer.Exit


@app.command(DEFAULT, cls=DefaultCommand, context_settings=HELP)
def fuse(
    model: Annotated[Path, typer.Argument(help="The ONNX file to fuse.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write the fused model; without it, only the report is made."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(help="ort: for stock ONNX Runtime. onnx: standard operators. functions: fused nodes with bodies."),
    ] = "ort",
    dim: Dims = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Prove every rewrite, and compare the result with the original."),
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    diff: Annotated[
        Path | None,
        typer.Option(help="Write what was fused, before and after, to this file: .html, .svg, .txt or .json."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Quantize weights: int8, int4, nf4, w8a8, fp8; int4:64, int8:channel, int4:32:asymmetric.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Of modules whose weights are not quantized.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(metavar="GLOB=FORMAT", help="A format of its own for some modules' weights.")
    ] = None,
    quantize_head: Annotated[
        bool, typer.Option("--quantize-head", help="Quantize the product that makes the logits as well.")
    ] = False,
    accuracy_level: Annotated[
        int | None,
        typer.Option(help="Of MatMulNBits: 4 lets ONNX Runtime round inputs to eight bits, faster and less exact."),
    ] = None,
    clip: Clip = False,
    calibrate: Calibrate = None,
    method: Method = "gptq",
    calibration_tokens: CalibrationTokens = 16384,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure quality on this text; by default on what --calibrate leaves."),
    ] = None,
    tokenizer: Tokenizer = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show by layer what was fused, and every near miss.")
    ] = False,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="FUSION=N", help="Fail (exit 5, nothing written) unless exactly N were fused."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail (exit 5, nothing written) on any near miss, or if nothing was compared."),
    ] = False,
    emit_triton: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the Triton kernels that the fused model becomes, with tests and an index."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Element type of emitted kernels: bf16, fp16 or fp32.")] = "bf16",
    tokens: Annotated[
        int, typer.Option(help="Tokens of the decode step that kernels are emitted for, at most 64.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")] = False,
    verbose: Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the transformer in an ONNX file, fuse it, prove every rewrite, and write a file stock ONNX Runtime runs.

    Exit codes: 0 done, 1 failure, 2 usage, 3 input not supported, 4 verification failed (nothing written), 5 --expect or
    --strict unmet (nothing written).
    """
    with failing(quiet=quiet, verbose=verbose) as (console, progress):
        _run(console, progress, model, output, target, sizes(dim or [], "--dim"), verify, report, diff, explain,
             sizes(expect or [], "--expect"), strict, as_json, quiet, Emission(emit_triton, dtype, tokens),
             Quantization(quantize, keep or [], _formats(override or []), quantize_head, accuracy_level,
                          "mse" if clip else None, method),
             TextFiles(calibrate, text, tokenizer, calibration_tokens))  # fmt: skip


@app.command("explain", context_settings=HELP)
def explain_(
    model: Model,
    target: Annotated[str, typer.Option(help="What it is to be fused for, as of `fuse`.")] = "ort",
    dim: Dims = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every near miss and every place of it, not only the likeliest.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Say by layer what is fused, and why the rest is not.

    The likeliest reason comes first. Rewrites are proven as `fuse` proves them; nothing is written. Exit codes: those of
    `fuse`; near misses are no failure.
    """
    with failing(quiet=False, verbose=verbose) as (_, progress):
        from fuser import api
        from fuser.report import explanation_text

        explanation = api.explain(model, target=target, dims=sizes(dim or [], "--dim"), progress=progress)
        progress.stop()
        if as_json:
            print(json.dumps(explanation.to_json(), indent=2))
        else:
            print(lines(explanation_text(explanation, everything=everything)))


def _formats(entries: list[str]) -> dict[str, str]:
    """GLOB=FORMAT pairs."""
    found = {}
    for entry in entries:
        glob, _, name = entry.rpartition("=")
        if not glob or not name:
            raise UsageError(f"--override {entry}: expected GLOB=FORMAT")
        found[glob] = name
    return found


def _unmet(report: Any, expected: dict[str, int], strict: bool) -> list[str]:
    """What `--expect` and `--strict` asked for and did not get."""
    found = [
        f"expected {count} {name}, fused {report.fused.get(name, 0)}"
        for name, count in expected.items()
        if report.fused.get(name, 0) != count
    ]
    if strict and report.misses:
        found.append(f"{sum(report.missed.values())} near misses: {', '.join(sorted(report.missed))}")
    if strict and report.verification.skipped:
        found.append(f"not compared end to end: {report.verification.skipped}")
    return found


def _run(
    console: Console,
    progress: Progress,
    model: Path,
    output: Path | None,
    target: str,
    sizes: dict[str, int],
    verify: bool,
    report_file: Path | None,
    diff_file: Path | None,
    explain: bool,
    expected: dict[str, int],
    strict: bool,
    as_json: bool,
    quiet: bool,
    emission: Emission,
    quantization: Quantization,
    files: TextFiles,
) -> None:
    from fuser import api
    from fuser.diff.comparison import form_of
    from fuser.exporter import write_text

    outputs = {"-o": output, "--report": report_file, "--diff": diff_file}
    named = {option: file for option, file in outputs.items() if file is not None}
    for option, file in named.items():
        api.check_output(file, [model])
        for other in list(named)[: list(named).index(option)]:
            if named[other].resolve() == file.resolve():
                raise UsageError(f"{option} and {other} are the same file, '{file}'")
    if diff_file is not None:
        form_of(diff_file)
    if emission.folder is not None:
        api.check_emission(emission.folder, dtype=emission.dtype, tokens=emission.tokens)
    if quantization.quantize is None and files.text is not None:
        raise UsageError("--text measures what quantizing costs: give --quantize, a format, as well")
    texts = calibration = None
    if files.calibrate is not None or files.text is not None:
        from fuser import evaluating

        texts = evaluating.texts(model.parent, **vars(files))
        calibration = texts.calibration
    fused = api.fuse(model, target=target, dims=sizes, verify=verify, progress=progress, calibration=calibration,
                     **vars(quantization))  # fmt: skip
    if texts is not None:
        fused.report.measured = evaluating.measured(fused, model, texts, progress)
    progress.stop()
    record = fused.report
    for file in named.values():
        api.check_output(file, fused.sources)
    unmet = _unmet(record, expected, strict)
    if output is not None and not unmet:
        progress("write")
        fused.save(output)
        progress.stop()
    if emission.folder is not None and not unmet:
        progress("emit")
        fused.emit_triton(emission.folder, dtype=emission.dtype, tokens=emission.tokens)
        progress.stop()
    if report_file is not None:
        write_text(report_file, json.dumps(record.to_json(), indent=2) + "\n")
    if diff_file is not None and not unmet:
        progress("diff")
        fused.diff().save(diff_file)
        progress.stop()
    if as_json:
        print(json.dumps(record.to_json(), indent=2))
    if not quiet:
        console.print(lines(record.text(misses=0 if explain else 5)), markup=False)
        if explain:
            console.print(lines(f"\n{fused.explain(everything=True)}"), markup=False)
        if output is not None and not unmet:
            console.print(f"\nwrote {output}", markup=False)
        if diff_file is not None and not unmet:
            console.print(f"\nwrote {diff_file}", markup=False)
        if emission.folder is not None and not unmet:
            console.print(f"\nwrote kernels to {emission.folder}", markup=False)
    if unmet:
        raise ExpectationError("; ".join(unmet) + ("; nothing was written" if output else ""))
