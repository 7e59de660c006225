"""`fuse plan` and `fuse profile`: what a model costs, on paper and measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fuser.cli.console import HELP, KvCache, Verbose, Weights, app, counts, failing, lines
from fuser.errors import UnsupportedOperator, UsageError

STANDARD = "RTX-4090,L40,L4,A100-80G,A30,A40,A10,A2,H100,H200"


@app.command(context_settings=HELP)
def plan(
    model: Annotated[
        str, typer.Argument(help="An ONNX file, a Hugging Face folder, or a name, as Llama-2-7B.", show_default=False)
    ],
    gpu: Annotated[str, typer.Option(metavar="NAME,...", help="GPUs; all: every one that is known.")] = STANDARD,
    quantize: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Of weights: int8, int4, int4:64, nf4, w8a8, fp8, ...")
    ] = None,
    kv: Annotated[
        str, typer.Option(help="Of keys and values: auto (that of dtype), int8, int8:32, int8:128.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    tp: Annotated[int, typer.Option(min=1, help="Cards that share each layer.")] = 1,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 512,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences; by default as many as fit.", show_default=False)
    ] = None,
    lengths: Annotated[str, typer.Option(help="Lengths of which the cache's size is told.")] = "128,512,4096",
    assume: Annotated[str, typer.Option(help="ours, or talk: those of a published talk (docs/cost.md).")] = "ours",
    bandwidth: Annotated[float | None, typer.Option(help="Share of the memory's rate that is reached.")] = None,
    compute: Annotated[float | None, typer.Option(help="Share of the arithmetic's rate that is reached.")] = None,
    link: Annotated[float | None, typer.Option(help="Share of the link's rate that is reached.")] = None,
    memory: Annotated[float | None, typer.Option(help="Share of memory that weights and cache may take.")] = None,
    gpus: Annotated[Path | None, typer.Option(metavar="FILE", help="More GPUs, as gpus.toml states them.")] = None,
    shapes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More shapes, as shapes.toml states them.")
    ] = None,
    launches: Annotated[
        bool, typer.Option("--launches", help="Of each GPU: what every launch asks for, and the step that follows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; bytes and seconds.")] = False,
    verbose: Verbose = False,
) -> None:
    """Plan memory and tell the limits of a decode step: weights, cache, the largest batch, latencies and tokens a second.

    Nothing is measured: all follows from sizes, datasheets, and the assumptions that are printed. Exit codes: those of `fuse`.
    """
    with failing(quiet=as_json, verbose=verbose) as (_, progress):
        from fuser import cost
        from fuser.cost import planning
        from fuser.cost.gpus import chosen, known

        if assume not in planning.KNOWN:
            raise UsageError(f"--assume {assume}: expected {' or '.join(planning.KNOWN)}")
        given = {"bandwidth": bandwidth, "compute": compute, "link": link, "memory": memory}
        for name, share in given.items():
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"--{name} {share:g}: expected a share above 0 and up to 1")
        shares: dict[str, Any] = {name: share for name, share in given.items() if share is not None}
        assumptions = replace(planning.KNOWN[assume], **shares)
        cards = chosen(gpu, known(gpus))
        seqlens = counts(lengths, "--lengths", 1 << 30)
        if launches:
            _launches(model, shapes, cards, progress, quantize, kv, dtype, seqlen, batch or 1, assumptions, as_json)
            return
        progress("read")
        wanted = cost.workload(model, shapes=shapes)
        progress.stop()
        plans = [
            planning.plan_on(
                wanted, card, quantize=quantize, kv=kv, dtype=dtype, tp=tp, seqlen=seqlen, batch=batch,
                assumptions=assumptions,
            )
            for card in cards
        ]  # fmt: skip
        if as_json:
            print(json.dumps({"model": wanted.name, "plans": [plan.to_json() for plan in plans]}, indent=2))
            return
        first = plans[0]
        cards_text = f"{tp} cards each" if tp > 1 else "one card"
        print(
            lines(
                f"{wanted.name}, weights {first.weights}, cache {first.kv}, {seqlen} tokens a sequence, {cards_text}\n"
                f"{planning.weights_text(first)}\n\n"
                f"{planning.cache_text(wanted, kv, dtype, seqlens, assumptions)}\n\n"
                f"of a token, all layers, in {dtype}; compute: 2^40 multiply-adds\n"
                f"{planning.operators_text(wanted, seqlen, dtype, assumptions)}\n\n"
                f"{planning.plans_text(plans)}\n\n{assumptions.text()}"
            )
        )


def _launches(
    model: str, shapes: Path | None, cards: list[Any], progress: Any, quantize: str | None, kv: str, dtype: str, seqlen: int,
    batch: int, assumptions: Any, as_json: bool,
) -> None:  # fmt: skip
    """Prints what each launch of a model asks for, and how long a step takes with these launches."""
    from fuser.cost import analysis, modules, prediction
    from fuser.cost.workload import shape_named

    path = Path(model)
    made = modules.graph_of(path if path.exists() else shape_named(model, shapes), quantize=quantize, note=progress)
    costs = analysis.scaled(analysis.analyze(made.graph), made)
    found, refused = [], ""
    try:
        for card in cards:
            how: dict[str, Any] = {"batch": batch, "context": seqlen, "dtype": dtype, "kv": kv}
            found.append(prediction.predict(made, card, assumptions=assumptions, **how))
    except UnsupportedOperator as error:  # there is no program, whose launches could be counted
        refused = f"no step is predicted: {error}"
    progress.stop()
    if as_json:
        told = {
            "launches": analysis.formulas(costs),
            "predictions": [one.to_json() for one in found],
            "refused": refused,
        }
        print(json.dumps({"model": made.name, **told}, indent=2))
        return
    for i, card in enumerate(cards):
        print(lines(analysis.text(costs, card, assumptions, batch=batch, context=seqlen)), end="\n\n")
        print(lines(prediction.text(found[i]) if i < len(found) else refused), end="\n\n")
    print(lines(assumptions.text()))


@app.command(context_settings=HELP)
def profile(
    model: Annotated[str, typer.Argument(help="An ONNX file, or a name, as Llama-2-7B.", show_default=False)],
    batch: Annotated[str, typer.Option(help="How many sequences at once.")] = "1",
    context: Annotated[int, typer.Option(min=2, help="Tokens of each sequence, the new one included.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of a name: bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[
        str | None, typer.Option(help="Of a name: cuda or cpu; by default a GPU that is there.", show_default=False)
    ] = None,
    quantize: Weights = None,
    kv_cache: KvCache = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Of a file: of ONNX Runtime.")] = 1,
    shapes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More shapes, as shapes.toml states them.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw rooflines and bars of the step as one page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; microseconds, bytes, FLOPs.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure each operator of a decode step on this machine, before and after fusion, repeated layers averaged.

    A file is run by ONNX Runtime on the CPU. Of a name three layers are made, with random weights: eager torch before, emitted
    kernels after (on the CPU their references). What the machine can do at most is measured first. Exit codes: those of `fuse`.
    """
    with failing(quiet=as_json, verbose=verbose) as (_, progress):
        batches = counts(batch, "--batch", 1024)
        path = Path(model)
        if html is not None:
            from fuser import api

            api.check_output(html, [path])
        if path.exists():
            if quantize is not None or device == "cuda":
                raise UsageError("a file is profiled as it is, on the CPU: --quantize and --device are for names")
            from fuser.cost import on_cpu

            found = [
                on_cpu.profile(path, batch=size, context=context, threads=threads, note=progress) for size in batches
            ]
        else:
            import torch

            from fuser.cost import launches as on_device
            from fuser.cost.workload import shape_named

            place = device or ("cuda" if torch.cuda.is_available() else "cpu")
            found = [
                on_device.profile(
                    shape_named(model, shapes), batch=size, context=context, dtype=dtype, device=place, quantize=quantize,
                    kv=kv_cache, note=progress,
                )
                for size in batches
            ]  # fmt: skip
        progress.stop()
        if html is not None:
            from fuser.cost import drawing
            from fuser.exporter import write_text

            write_text(html, drawing.page(found))
        if as_json:
            print(json.dumps([one.to_json() for one in found], indent=2))
        else:
            print("\n\n".join(lines(one.text()) for one in found))
            steps = [
                (one.batch, one.step_us / 1e3, one.predicted_us / 1e3)
                for one in found
                if one.step_us and one.predicted_us
            ]
            if steps:
                from fuser.cost.prediction import compared_text

                print("\n" + compared_text((*step, step[2] / step[1] - 1) for step in steps))
