"""`fuse generate`, `fuse bench` and `fuse eval`: models that run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fuser.cli.console import (
    HELP,
    Calibrate,
    CalibrationTokens,
    Clip,
    KvCache,
    Method,
    Tokenizer,
    Verbose,
    Weights,
    app,
    counts,
    failing,
    lines,
)
from fuser.errors import UsageError


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
    with failing(quiet=False, verbose=verbose) as (_, progress):
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

        batches = counts(batch, "--batch", 1024)
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
    with failing(quiet=quiet, verbose=verbose) as (console, progress):
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
            console.print(lines(generating.statistics_text(found["statistics"])), markup=False)


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
    clip: Clip = False,
    calibrate: Calibrate = None,
    method: Method = "gptq",
    calibration_tokens: CalibrationTokens = 16384,
    kv_cache: Annotated[str, typer.Option(help="Element type of MODEL's keys and values; auto: dtype.")] = "auto",
    tokens: Annotated[int | None, typer.Option(help="Use so many tokens of the text at most.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; by default as many as the model takes, at most 2048.")
    ] = None,
    tokenizer: Tokenizer = None,
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
    with failing(quiet=quiet, verbose=verbose) as (_, progress):
        from fuser import evaluating

        trial = evaluating.Trial(
            model, evaluating.read(text), against=against, tokens=tokens, context=context, dtype=dtype, device=device,
            tokenizer=tokenizer, progress=progress,
        )  # fmt: skip
        given = evaluating.read(calibrate) if calibrate is not None else None
        asked = quantize.split(",") if quantize is not None else []
        ways = trial.ways(asked, clip=clip, calibration=given, tokens=calibration_tokens, method=method)
        found = evaluating.rows(trial, ways, kv_cache=kv_cache, is_compared=against is not None)
        evaluating.main(trial, found, as_json=as_json)


def _ids(text: str) -> list[int]:
    found = text.replace(",", " ").split()
    if not all(part.isdecimal() for part in found):
        raise UsageError(f"--token-ids {text}: expected whole numbers, with commas between")
    return [int(part[:20]) for part in found]
