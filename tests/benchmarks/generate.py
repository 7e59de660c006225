"""Greedy `generate()` of a compiled model against transformers itself: the same tokens, and the ratio of times.

    python -m tests.benchmarks.generate                        # the demo model, 64 tokens
    python -m tests.benchmarks.generate --folder models/demo --tokens 64 --rounds 9 --dtype float32

Rounds alternate between the two; the ratio is of medians. A prompt of 12 tokens is generated from first, which compiles nothing
more: the graph serves prompts and steps of all lengths.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import fuser

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
PROMPT = 12


@dataclass
class Outcome:
    """Seconds of each round, and whether both gave the same tokens."""

    eager_s: list[float]
    compiled_s: list[float]
    equal: bool
    compile_s: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.compiled_s) / statistics.median(self.eager_s)


def measure(folder: Path, *, tokens: int, rounds: int, dtype: str = "float32", device: str = "cpu") -> Outcome:
    """Times both on one prompt; `folder` is a Hugging Face folder of a causal model."""
    model: Any = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    )
    begin = time.perf_counter()
    compiled: Any = fuser.compile(model)
    compile_s = time.perf_counter() - begin
    vocabulary = model.config.vocab_size
    prompt = torch.randint(3, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    asked = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False,
    }  # fmt: skip
    times: dict[int, list[float]] = {0: [], 1: []}
    given = [one.generate(prompt, **asked) for one in (model, compiled)]
    for _ in range(rounds):
        for index, one in enumerate((model, compiled)):
            begin = time.perf_counter()
            given[index] = one.generate(prompt, **asked)
            times[index].append(time.perf_counter() - begin)
    return Outcome(times[0], times[1], bool(torch.equal(*given)), compile_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEMO)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    found = measure(given.folder, tokens=given.tokens, rounds=given.rounds, dtype=given.dtype, device=given.device)
    eager, compiled = (1e3 * statistics.median(x) / given.tokens for x in (found.eager_s, found.compiled_s))
    print(f"{given.folder.name}: {given.tokens} tokens, {given.rounds} rounds, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    print(f"  eager     {eager:8.3f} ms a token")
    print(f"  compiled  {compiled:8.3f} ms a token, ratio {found.ratio:.2f}, compiled in {found.compile_s:.1f} s")
    print(f"  tokens    {'equal' if found.equal else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
