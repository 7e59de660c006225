"""`fuse plan`: what a model costs, on paper."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fuser.cli.console import HELP, Verbose, app, counts, failing, lines
from fuser.errors import UsageError

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
