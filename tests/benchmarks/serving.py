"""Serving a model of a well-known shape with random weights, end to end, on a CUDA device.

python -m tests.benchmarks.serving make FOLDER [--shape llama-2-7b]     weights drawn on the device, saved
python -m tests.benchmarks.serving load FOLDER                          seconds to the first token, peak of memory
python -m tests.benchmarks.serving steps FOLDER [--batch 1,16,64]       milliseconds a step at context 512
    [--quantize int4] [--kv-cache int8]                                 of weights, of keys and values
python -m tests.benchmarks.serving mixed FOLDER                         64 requests of mixed lengths: tokens a second
python -m tests.benchmarks.serving peers FOLDER                         transformers, eager and with torch.compile
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from fuser import LLM, SamplingParams, throughput
from fuser.trials import copy_rate

SHAPES = {
    "llama-2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip


def made(folder: Path, shape: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], eos_token_id=None))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{shape}: {size / 1e9:.2f} GB", flush=True)


def loaded(folder: Path, **more: Any) -> tuple[LLM, float]:
    start = time.perf_counter()
    stages: list[tuple[float, str]] = []

    def note(stage: str) -> None:
        stages.append((time.perf_counter() - start, stage))

    llm = LLM(folder, dtype="bf16", progress=note, **more)
    for at, stage in stages:
        print(f"  {at:6.1f} s  {stage}", flush=True)
    return llm, start


def load(folder: Path) -> None:
    llm, start = loaded(folder)
    ready = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    llm.generate([[1, 2, 3, 4, 5]], SamplingParams(max_new_tokens=1))
    first = time.perf_counter() - start
    stepper = llm.runner.stepper
    weights = sum(t.numel() * t.element_size() for t in stepper.weights.made.values())
    pool = sum(
        t.numel() * t.element_size() for t in {id(x): x for c in stepper.caches.values() for x in c.values()}.values()
    )
    print(
        f"ready after {ready:.1f} s, first token after {first:.1f} s; weights {weights / 1e9:.2f} GB, pool {pool / 1e9:.2f} GB, "
        f"peak {peak / 1e9:.2f} GB: {peak / (weights + pool):.3f} of both",
        flush=True,
    )


def steps(folder: Path, batches: list[int], context: int, quantize: str | None, kv_cache: str) -> None:
    more: dict[str, Any] = {"quantization": quantize, "kv_cache": kv_cache}
    llm, _ = loaded(folder, **more, max_sequences=max(batches), prefix_caching=False, memory_fraction=0.95)
    throughput.main(llm, batches, context=context, steps=64)


def mixed(folder: Path) -> None:
    llm, _ = loaded(folder, max_sequences=64)
    drawn = random.Random(0)
    requests = [(drawn.randint(32, 2048), drawn.randint(16, 512)) for _ in range(64)]
    prompts = [[drawn.randrange(32000) for _ in range(length)] for length, _ in requests]
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for _, count in requests]
    for name in ("first", "second"):
        for prompt in prompts:
            prompt[0] = drawn.randrange(32000)  # nothing is known of it
        start = time.perf_counter()
        found = llm.generate(prompts, params)
        took = time.perf_counter() - start
        new = sum(len(result.token_ids) for result in found)
        print(
            f"{name} time: {new} tokens of {sum(map(len, prompts))} in prompts in {took:.2f} s: {new / took:.0f} tokens/s, "
            f"{llm.engine.scheduler.preemptions} preemptions",
            flush=True,
        )


def peers(folder: Path, batches: list[int], context: int) -> None:
    """transformers on the same weights, with a static cache: eager, and under torch.compile."""
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    print(f"copy {copy_rate():.0f} GB/s", flush=True)
    for batch in batches:
        cache = StaticCache(config=model.config, max_cache_len=context + 64)
        ids = torch.randint(0, 32000, (batch, context), device="cuda")
        with torch.inference_mode():
            out = model(
                ids, past_key_values=cache, cache_position=torch.arange(context, device="cuda"), logits_to_keep=1
            )
            token = out.logits[:, -1:].argmax(-1)
            for name, run in (
                ("eager", model.forward),
                ("compiled", torch.compile(model.forward, mode="reduce-overhead")),
            ):
                times: list[float] = []
                for i in range(24):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    place = torch.tensor([context + i], device="cuda")
                    out = run(
                        token, past_key_values=cache, cache_position=place, position_ids=place[None], logits_to_keep=1
                    )
                    token = out.logits[:, -1:].argmax(-1).clone()
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - begin)
                took = sorted(times[8:])[8]
                print(f"transformers {name:9} batch {batch}: {took * 1e3:.3f} ms, start {times[0]:.0f} s", flush=True)
        del cache
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "load", "steps", "mixed", "peers"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--quantize")
    parser.add_argument("--kv-cache", default="auto")
    given = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    batches = [int(part) for part in given.batch.split(",")]
    if given.what == "make":
        made(given.folder, given.shape)
    elif given.what == "load":
        load(given.folder)
    elif given.what == "steps":
        steps(given.folder, batches, given.context, given.quantize, given.kv_cache)
    elif given.what == "mixed":
        mixed(given.folder)
    else:
        peers(given.folder, batches, given.context)


if __name__ == "__main__":
    main()
