"""`fuse plan-kernels` and `fuse tune`: the kernels that models become."""

from pathlib import Path
from typing import Annotated

import typer

from fuser.cli.console import HELP, Dims, KvCache, Model, Verbose, app, counts, failing, line, lines, sizes


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
    with failing(quiet=False, verbose=verbose) as (_, progress):
        from fuser import api
        from fuser.codegen import plan

        launches = api.plan_kernels(model, regime=regime, dims=sizes(dim or [], "--dim"), progress=progress)
        progress.stop()
        print(lines(plan.text(launches, sizes(size or [], "--size"))))


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
    with failing(quiet=quiet, verbose=verbose) as (console, progress):
        from fuser import tuning
        from fuser.codegen.kv_groups import kv_group_of
        from fuser.formats import format_of

        tried = counts(tokens)
        if model is None:
            group = kv_group_of(kv_cache, dtype)
            formats = [None if name == "none" else format_of(name) for name in quantize.split(",")]
            problems = tuning.standard(tried, dtype, [name.strip() for name in shapes.split(",")], group, formats)
        else:
            from fuser import api

            fused = api.fuse(model, target="functions", verify=False, progress=progress)
            programs = [fused.program(dtype=dtype, tokens=count, kv_cache=kv_cache) for count in tried]
            problems = [problem for program in programs for problem in tuning.of_program(program)]
        progress.stop()
        say = (lambda text: None) if quiet else (lambda text: console.print(line(text), markup=False))
        found = tuning.tune(problems, seconds=seconds, say=say)
        if not quiet:
            console.print(lines(found.text()), markup=False)
