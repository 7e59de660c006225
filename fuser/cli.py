"""The command: `fuse model.onnx -o fused.onnx`, and those beside it: `fuse explain model.onnx`."""

import json
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from fuser.errors import ExpectationError, FuserError, UsageError
from fuser.version import __version__

QUIET_SECONDS = 2.0

DEFAULT = "fuse"


class Commands(TyperGroup):
    """Commands by name, and without a name the default one: a file called like a command is `./explain`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        name = args[0] if args and args[0] in self.commands and args[0] != DEFAULT else ""
        if name:
            return self.commands[name].make_context(f"{info_name} {name}", args[1:], parent, **extra)
        return self.commands[DEFAULT].make_context(info_name, args, parent, obj=self, **extra)

    def invoke(self, ctx: Any) -> Any:
        return ctx.command.invoke(ctx)


class DefaultCommand(TyperCommand):
    """The default command, whose help lists the others."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        others = [command for name, command in ctx.obj.commands.items() if name != DEFAULT]
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.get_short_help_str(formatter.width)) for command in others])
        super().format_epilog(ctx, formatter)


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
HELP = {"help_option_names": ["-h", "--help"]}


class Progress:
    """Names the running stage on stderr once it has lasted two seconds."""

    def __init__(self, console: Console, enabled: bool) -> None:
        self.console, self.enabled = console, enabled
        self.timer: threading.Timer | None = None
        self.status: Any = None
        self.stage = ""

    def __call__(self, stage: str) -> None:
        """A stage begins; one whose first word is that of the running stage goes on with it: `quantize layers.0.mlp`."""
        goes_on = self.timer is not None and stage.split()[:1] == self.stage.split()[:1]
        self.stage = stage
        if goes_on:
            if self.status is not None:
                self.status.update(_line(f"{stage} ..."))
            return
        self.stop()
        if self.enabled:
            self.timer = threading.Timer(QUIET_SECONDS, self._show)
            self.timer.daemon = True
            self.timer.start()

    def _show(self) -> None:
        text = _line(f"{self.stage} ...")
        if self.console.is_terminal:
            self.status = self.console.status(text)
            self.status.start()
        else:
            self.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.status is not None:
            self.status.stop()
        self.timer = self.status = None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fuse {__version__}")
        raise typer.Exit


def _sizes(entries: list[str], option: str) -> dict[str, int]:
    """NAME=N pairs."""
    found: dict[str, int] = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        if not name or not number.isdecimal():
            raise UsageError(f"{option} {entry}: expected NAME=N, N a whole number")
        name, size = name.strip(), int(number[:20])
        if found.setdefault(name, size) != size:
            raise UsageError(f"{option} {entry}: {name} is {found[name]} already")
    return found


def _formats(entries: list[str]) -> dict[str, str]:
    """GLOB=FORMAT pairs."""
    found = {}
    for entry in entries:
        glob, _, name = entry.rpartition("=")
        if not glob or not name:
            raise UsageError(f"--override {entry}: expected GLOB=FORMAT")
        found[glob] = name
    return found


def _line(text: str) -> str:
    """`text` on one line, whatever names a model brought into it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


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


def _lines(text: str) -> str:
    return "\n".join(map(_line, text.split("\n")))


@contextmanager
def _failing(*, quiet: bool, verbose: bool) -> Iterator[tuple[Console, Progress]]:
    """The console and the progress of a command; whatever is raised ends it with one line and its exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    progress = Progress(console, not quiet)
    try:
        yield console, progress
    except FuserError as error:
        progress.stop()
        console.print(_line(f"fuse: {error}"), markup=False)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        progress.stop()
        console.print("fuse: interrupted; nothing was written")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # whoever read stdout has gone; typer ends quietly
    except Exception as error:
        progress.stop()
        if verbose:
            traceback.print_exc()
        text = str(error).splitlines()[0] if str(error) else ""
        console.print(
            _line(f"fuse: internal error, {type(error).__name__}: {text} (-v shows where; please report it)"),
            markup=False,
        )
        raise typer.Exit(1) from None
    finally:
        progress.stop()


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


Model = Annotated[Path, typer.Argument(help="The ONNX file.", show_default=False)]
Dims = Annotated[list[str] | None, typer.Option(metavar="NAME=N", help="Fix a named dim of the inputs.")]
KvCache = Annotated[
    str, typer.Option(help="Element type of keys and values: auto (that of dtype), int8, or int8:GROUP (32, 64, 128).")
]
Weights = Annotated[
    str | None, typer.Option("--quantize", help="Quantize weights: int8, int4, int4:64, nf4, w8a8, fp8, ...")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks of internal errors.")]


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
    with _failing(quiet=quiet, verbose=verbose) as (console, progress):
        _run(console, progress, model, output, target, _sizes(dim or [], "--dim"), verify, report, explain,
             _sizes(expect or [], "--expect"), strict, as_json, quiet, Emission(emit_triton, dtype, tokens),
             Quantization(quantize, keep or [], _formats(override or []), quantize_head, accuracy_level))  # fmt: skip


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
    with _failing(quiet=False, verbose=verbose) as (_, progress):
        from fuser import api
        from fuser.report import explanation_text

        explanation = api.explain(model, target=target, dims=_sizes(dim or [], "--dim"), progress=progress)
        progress.stop()
        if as_json:
            print(json.dumps(explanation.to_json(), indent=2))
        else:
            print(_lines(explanation_text(explanation, everything=everything)))


@app.command("plan-kernels", context_settings=HELP)
def plan_kernels(
    model: Model,
    regime: Annotated[str, typer.Option(help="decode: at most 64 tokens at once. prefill: more.")] = "decode",
    dim: Dims = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Tell bytes and FLOPs at this size of a named dim.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Show the kernel launches that a model becomes: what each computes, its bytes and FLOPs, and where it comes from.

    Repeated layers are shown once. Amounts stay formulas of the dims whose size is not given.
    """
    with _failing(quiet=False, verbose=verbose) as (_, progress):
        from fuser import api
        from fuser.codegen import plan

        launches = api.plan_kernels(model, regime=regime, dims=_sizes(dim or [], "--dim"), progress=progress)
        progress.stop()
        print(_lines(plan.text(launches, _sizes(size or [], "--size"))))


@app.command(context_settings=HELP)
def tune(
    model: Annotated[
        Path | None, typer.Argument(help="The ONNX file whose kernels are tuned; without it those of --shapes.")
    ] = None,
    shapes: Annotated[str, typer.Option(help="Well-known models to tune for.")] = "llama-2-7b,llama-3-8b",
    tokens: Annotated[str, typer.Option(help="Tokens of the decode steps.")] = "1,16,64",
    dtype: Annotated[str, typer.Option(help="Element type: bf16, fp16 or fp32.")] = "bf16",
    kv_cache: KvCache = "auto",
    quantize: Annotated[
        str, typer.Option(help="Of --shapes: formats of weights, as int4,nf4; none for those as they are.")
    ] = "none,int4,nf4,int8,w8a8",
    seconds: Annotated[float, typer.Option(help="The time that may be taken.")] = 300.0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")] = False,
    verbose: Verbose = False,
) -> None:
    """Search the fastest configurations of kernels on this machine's GPU, and keep them in the user's cache folder.

    What was found before stays where nothing faster is measured in its place. Exit codes: those of `fuse`.
    """
    with _failing(quiet=quiet, verbose=verbose) as (console, progress):
        from fuser import tuning
        from fuser.codegen.kv_groups import kv_group_of
        from fuser.formats import format_of

        counts = _counts(tokens)
        if model is None:
            group = kv_group_of(kv_cache, dtype)
            formats = [None if name == "none" else format_of(name) for name in quantize.split(",")]
            problems = tuning.standard(counts, dtype, [name.strip() for name in shapes.split(",")], group, formats)
        else:
            from fuser import api

            fused = api.fuse(model, target="functions", verify=False, progress=progress)
            programs = [fused.program(dtype=dtype, tokens=count, kv_cache=kv_cache) for count in counts]
            problems = [problem for program in programs for problem in tuning.of_program(program)]
        progress.stop()
        say = (lambda text: None) if quiet else (lambda text: console.print(_line(text), markup=False))
        found = tuning.tune(problems, seconds=seconds, say=say)
        if not quiet:
            console.print(_lines(found.text()), markup=False)


@app.command(context_settings=HELP)
def bench(
    model: Annotated[
        Path | None, typer.Argument(help="A model whose steps of generation are measured; without it, kernels.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Of a model: how many sequences at once.")] = "1,16,64",
    context: Annotated[int, typer.Option(min=1, help="Of a model: tokens of a sequence before the first step.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Of a model: how many steps are measured.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="Of a model: bf16, fp16 or fp32; by default its own.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Of a model: where it runs; by default a GPU that is there.")
    ] = None,
    kv_cache: KvCache = "auto",
    quantize: Weights = None,
    only: Annotated[str, typer.Option(help="Of kernels: only what has this in its name.")] = "",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Of kernels: measure torch.compile too.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Of a model: print JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure on this machine: steps of a model that generates, or emitted kernels beside torch's.

    Times stand beside what the bytes take at the rate of the device's own copy, which is measured first.
    """
    with _failing(quiet=False, verbose=verbose) as (_, progress):
        import torch

        if model is None:
            if not torch.cuda.is_available():
                raise UsageError("the benchmark of kernels measures on a CUDA device, and there is none")
            from fuser import bench as measuring

            progress.stop()
            measuring.main(only, compiled=compiled)
            return
        from fuser import throughput
        from fuser.llm import LLM

        batches = _counts(batch, "--batch", 1024)
        llm = LLM(
            model, dtype=dtype, device=device, kv_cache=kv_cache, quantization=quantize, max_sequences=max(batches),
            prefix_caching=False, progress=progress,
        )  # fmt: skip
        progress.stop()
        throughput.main(llm, batches, context=context, steps=steps, as_json=as_json)


@app.command(context_settings=HELP)
def generate(
    model: Annotated[Path, typer.Argument(help="An ONNX file or a Hugging Face folder.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option("-p", "--prompt", help="A text; several are generated together.")
    ] = None,
    token_ids: Annotated[list[str] | None, typer.Option(metavar="N,N,...", help="A prompt of token ids.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of a sample.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens whose probabilities come to this.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn; the same seed draws the same.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a sample.")] = None,
    n: Annotated[int, typer.Option("-n", help="Samples of each prompt.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default the model's own.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where it runs; by default a GPU that is there, else the CPU.")
    ] = None,
    kv_cache: KvCache = "auto",
    quantize: Weights = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say on stderr how long it took, and what the cache held.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results and statistics as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
    verbose: Verbose = False,
) -> None:
    """Generate text, as it comes.

    Exit codes: those of `fuse`; 2 also for prompts that cannot be.
    """
    with _failing(quiet=quiet, verbose=verbose) as (console, progress):
        from fuser import generating
        from fuser.llm import LLM, Prompt
        from fuser.runtime.parameters import SamplingParams

        prompts: list[Prompt] = [*(prompt or []), *(_ids(text) for text in token_ids or [])]
        if not prompts:
            raise UsageError("there is no prompt: give --prompt TEXT, or --token-ids N,N,...")
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            n=n,
        )
        llm = LLM(
            model, dtype=dtype, device=device, kv_cache=kv_cache, quantization=quantize, progress=progress
        )  # fmt: skip
        progress.stop()
        say = (lambda text: None) if as_json else (lambda text: print(text, end="", flush=True))
        found = generating.generate(llm, prompts, params, say)
        progress.stop()
        if as_json:
            print(json.dumps(found, indent=2))
        if stats:
            console.print(_lines(generating.statistics_text(found["statistics"])), markup=False)


@app.command("eval", context_settings=HELP)
def eval_(
    model: Annotated[Path, typer.Argument(help="An ONNX file or a Hugging Face folder.", show_default=False)],
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text, UTF-8.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(metavar="ORIGINAL", help="Compare with this model; else MODEL is the original.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="FORMAT,...", help="Compare MODEL in these formats: int8,int4:128,nf4:64,w8a8."),
    ] = None,
    clip: Annotated[
        bool, typer.Option("--clip", help="Quantize with scales that make each group's squared error least.")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Quantize by GPTQ, computing the model on this text; UTF-8.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Use so many tokens of it at most.")] = 16384,
    kv_cache: Annotated[str, typer.Option(help="Element type of MODEL's keys and values; auto: dtype.")] = "auto",
    tokens: Annotated[int | None, typer.Option(help="Use so many tokens of the text at most.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; by default as many as the model takes, at most 2048.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A tokenizer's folder; by default the model's own.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default the model's own.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where it runs; by default a GPU that is there, else the CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure how well a model predicts a text: perplexity, and how near its predictions are to an original's.

    Near: mean and 99.9th percentile of KL(original || model) of next-token distributions, in nats, and the share of tokens
    whose likeliest one is the same. Exit codes: those of `fuse`.
    """
    with _failing(quiet=quiet, verbose=verbose) as (_, progress):
        from fuser import evaluating

        trial = evaluating.Trial(
            model, evaluating.read(text), against=against, tokens=tokens, context=context, dtype=dtype, device=device,
            tokenizer=tokenizer, progress=progress,
        )  # fmt: skip
        given = evaluating.read(calibrate) if calibrate is not None else None
        asked = quantize.split(",") if quantize is not None else []
        ways = trial.ways(asked, clip=clip, calibration=given, tokens=calibration_tokens)
        found = evaluating.rows(trial, ways, kv_cache=kv_cache, is_compared=against is not None)
        evaluating.main(trial, found, as_json=as_json)


def _ids(text: str) -> list[int]:
    found = text.replace(",", " ").split()
    if not all(part.isdecimal() for part in found):
        raise UsageError(f"--token-ids {text}: expected whole numbers, with commas between")
    return [int(part[:20]) for part in found]


def _counts(text: str, option: str = "--tokens", most: int = 64) -> list[int]:
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part[:20]) <= most for part in found):
        raise UsageError(f"{option} {text}: expected whole numbers from 1 to {most}, with commas between")
    return [int(part) for part in found]


def _run(
    console: Console,
    progress: Progress,
    model: Path,
    output: Path | None,
    target: str,
    sizes: dict[str, int],
    verify: bool,
    report_file: Path | None,
    explain: bool,
    expected: dict[str, int],
    strict: bool,
    as_json: bool,
    quiet: bool,
    emission: Emission,
    quantization: Quantization,
) -> None:
    from fuser import api
    from fuser.exporter import write_text

    if output is not None:
        api.check_output(output, [model])
    if report_file is not None:
        api.check_output(report_file, [model])
        if output is not None and output.resolve() == report_file.resolve():
            raise UsageError(f"--report and -o are the same file, '{output}'")
    if emission.folder is not None:
        api.check_emission(emission.folder, dtype=emission.dtype, tokens=emission.tokens)
    fused = api.fuse(model, target=target, dims=sizes, verify=verify, progress=progress, **vars(quantization))
    progress.stop()
    record = fused.report
    if report_file is not None:
        api.check_output(report_file, fused.sources)
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
    if as_json:
        print(json.dumps(record.to_json(), indent=2))
    if not quiet:
        console.print(_lines(record.text(misses=0 if explain else 5)), markup=False)
        if explain:
            console.print(_lines(f"\n{fused.explain(everything=True)}"), markup=False)
        if output is not None and not unmet:
            console.print(f"\nwrote {output}", markup=False)
        if emission.folder is not None and not unmet:
            console.print(f"\nwrote kernels to {emission.folder}", markup=False)
    if unmet:
        raise ExpectationError("; ".join(unmet) + ("; nothing was written" if output else ""))


def main() -> None:
    """The console entry point."""
    app()


if __name__ == "__main__":
    main()
