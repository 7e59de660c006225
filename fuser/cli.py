"""The command: `fuse model.onnx -o fused.onnx`."""

import json
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import fuser
from fuser.errors import ExpectationError, FuserError, UsageError

QUIET_SECONDS = 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Progress:
    """Names the running stage on stderr once it has lasted two seconds."""

    def __init__(self, console: Console, enabled: bool) -> None:
        self.console, self.enabled = console, enabled
        self.timer: threading.Timer | None = None
        self.status: Any = None

    def __call__(self, stage: str) -> None:
        self.stop()
        if self.enabled:
            self.timer = threading.Timer(QUIET_SECONDS, self._show, (stage,))
            self.timer.daemon = True
            self.timer.start()

    def _show(self, stage: str) -> None:
        if self.console.is_terminal:
            self.status = self.console.status(f"{stage} ...")
            self.status.start()
        else:
            self.console.print(f"{stage} ...", highlight=False)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.status is not None:
            self.status.stop()
        self.timer = self.status = None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fuse {fuser.__version__}")
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


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def fuse(
    model: Annotated[Path, typer.Argument(help="The ONNX file to fuse.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write the fused model; without it, only the report is made."),
    ] = None,
    target: Annotated[
        str, typer.Option(help="ort: runs in stock ONNX Runtime. functions: fused nodes with standard bodies.")
    ] = "ort",
    dim: Annotated[list[str] | None, typer.Option(metavar="NAME=N", help="Fix a named dim of the inputs.")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Prove every rewrite, and compare the result with the original."),
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every near miss and its reason.")] = False,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="FUSION=N", help="Fail (exit 5, nothing written) unless exactly N were fused."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail (exit 5, nothing written) on any near miss, or if nothing was compared."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks of internal errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the transformer in an ONNX file, fuse it, prove every rewrite, and write a file stock ONNX Runtime runs.

    Exit codes: 0 done, 1 failure, 2 usage, 3 input not supported, 4 verification failed (nothing written), 5 --expect or
    --strict unmet (nothing written).
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    progress = Progress(console, not quiet)
    try:
        _run(console, progress, model, output, target, _sizes(dim or [], "--dim"), verify, report, explain,
             _sizes(expect or [], "--expect"), strict, as_json, quiet)  # fmt: skip
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
) -> None:
    from fuser import api
    from fuser.exporter import write_text

    if output is not None:
        api.check_output(output, [model])
    if report_file is not None:
        api.check_output(report_file, [model])
        if output is not None and output.resolve() == report_file.resolve():
            raise UsageError(f"--report and -o are the same file, '{output}'")
    fused = api.fuse(model, target=target, dims=sizes, verify=verify, progress=progress)
    progress.stop()
    record = fused.report
    if report_file is not None:
        api.check_output(report_file, fused.sources)
    unmet = _unmet(record, expected, strict)
    if output is not None and not unmet:
        progress("write")
        fused.save(output)
        progress.stop()
    if report_file is not None:
        write_text(report_file, json.dumps(record.to_json(), indent=2) + "\n")
    if as_json:
        print(json.dumps(record.to_json(), indent=2))
    if not quiet:
        console.print(record.text(misses=None if explain else 5), markup=False)
        if output is not None and not unmet:
            console.print(f"\nwrote {output}", markup=False)
    if unmet:
        raise ExpectationError("; ".join(unmet) + ("; nothing was written" if output else ""))


def main() -> None:
    """The console entry point."""
    app()


if __name__ == "__main__":
    main()
