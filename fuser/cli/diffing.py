"""`fuse diff before.onnx after.onnx`: what of one file is what of the other."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fuser.cli.console import HELP, Verbose, app, failing


@app.command("diff", context_settings=HELP)
def diff(
    before: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="The ONNX file it is compared with.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the diff; without it, it is printed as text.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="html, svg, text or json; by default what the file's name ends in.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Show what of one ONNX file is what of another: what is the same, changed, fused, removed and added.

    The files are read and not run. Exit codes: those of `fuse`; a difference is no failure.
    """
    with failing(quiet=False, verbose=verbose) as (_, progress):
        from fuser import api
        from fuser.diff import comparison

        wanted = comparison.form_of(output, form) if output is not None else comparison.form_of("", form or "text")
        if output is not None:
            api.check_output(output, [before, after])
        progress("compare")
        found = comparison.of_files(before, after)
        if output is not None:
            found.save(output, form=wanted)
        elif wanted == "text" and sys.stdout.isatty():
            print(found.text(colour=True))
        else:
            sys.stdout.write(found.form(wanted))
        progress.stop()
