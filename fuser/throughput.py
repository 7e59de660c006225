"""`fuse bench MODEL`: how long a step of generation takes, beside the time its bytes take at the device's own copy rate."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import torch

from fuser.codegen.program import Weight
from fuser.errors import UsageError
from fuser.llm import LLM
from fuser.running import PagedRunner
from fuser.runtime.parameters import SamplingParams
from fuser.trials import copy_rate

WARM = 4  # steps that are not counted: graphs are captured


@dataclass(frozen=True)
class Measured:
    """Steps of `batch` sequences that had `context` tokens when the first began."""

    batch: int
    context: int
    steps: int
    step_s: float
    prefill_s: float
    step_bytes: int  # weights and keys and values that a step has to read, at the middle of the measurement

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s


def new_tokens(batch: int, *, context: int, steps: int, step_tokens: int) -> int:
    """Tokens that a sequence is asked for: those whose prompts come first generate while the others' are computed."""
    return steps + WARM + 2 + -(-batch * context // max(step_tokens - batch, 1))


def measure(llm: LLM, batches: Sequence[int], *, context: int, steps: int = 64) -> Iterator[Measured]:
    """Generates greedily from random prompts, and times the steps of which every sequence has one token.

    Raises:
        UsageError: the cache or the model does not hold so many tokens, or so many sequences.
    """
    drawn = random.Random(0)
    for batch in batches:
        most = new_tokens(batch, context=context, steps=steps, step_tokens=llm.engine.scheduler.step_tokens)
        room, needed = llm.engine.pool.pages, batch * llm.engine.pool.needed(0, context + most)
        if batch > llm.engine.sequences or needed > room:
            raise UsageError(f"{batch} sequences of {context + most} tokens need {needed} pages, there are {room}")
        params = SamplingParams(max_new_tokens=most, ignore_eos=True)
        start = perf_counter()
        ids = [
            llm.add_request([drawn.randrange(llm.runner.vocabulary) for _ in range(context)], params)
            for _ in range(batch)
        ]
        while len(llm.engine.scheduler.running) < batch or any(s.generated < 1 for s in llm.engine.scheduler.running):
            llm.step()
        _settled(llm)
        prefill_s = perf_counter() - start
        for _ in range(WARM):
            llm.step()
        _settled(llm)
        start = perf_counter()
        for _ in range(steps):
            llm.step()
        _settled(llm)
        took = (perf_counter() - start) / steps
        for request_id in ids:
            llm.cancel(request_id)
        while not llm.is_idle:
            llm.step()
        yield Measured(batch, context, steps, took, prefill_s, _bytes(llm, batch, context + WARM + steps // 2))


def _settled(llm: LLM) -> None:
    if llm.device.type == "cuda":
        torch.cuda.synchronize(llm.device)


def _bytes(llm: LLM, batch: int, context: int) -> int:
    """What a step reads at least: every weight but of tables once, the keys and values that are seen."""
    runner = llm.runner
    if not isinstance(runner, PagedRunner):
        return 0
    stepper = runner.stepper
    held = {a.key: a for step in stepper.program(1, decode=True).steps for a in step.arguments if isinstance(a, Weight)}
    weights = sum(
        stepper.weights[weight].numel() * stepper.weights[weight].element_size()
        for weight in held.values() if weight.kind not in ("table", "cos", "sin")
    )  # fmt: skip
    cached = sum(stepper.token_bytes(s) * min(context, s.window or context) for s in stepper.states)
    return weights + batch * cached


def main(llm: LLM, batches: Sequence[int], *, context: int, steps: int, as_json: bool = False) -> None:
    """Prints a table, a line as it is measured, or JSON."""
    rate = copy_rate() * 1e9 if llm.device.type == "cuda" else None
    name = torch.cuda.get_device_name(llm.device) if llm.device.type == "cuda" else "CPU"
    if not as_json:
        told = f"; copy {rate / 1e9:.0f} GB/s" if rate else ""
        kept = f", keys and values int8 by {llm.kv_group}" if llm.kv_group else ""
        print(f"{name}, torch {torch.__version__}, {llm.dtype}{kept}{told}\n{HEADER}", flush=True)
    found = []
    for measured in measure(llm, batches, context=context, steps=steps):
        found.append(asdict(measured))
        if not as_json:
            print(text(measured, rate), flush=True)
    if as_json:
        print(
            json.dumps(
                {"device": name, "kv_group": llm.kv_group, "copy_bytes_per_s": rate, "measured": found}, indent=2
            )
        )


def text(found: Measured, rate: float | None) -> str:
    """A line of the table; `rate`: bytes a second of the device's copy."""
    line = (
        f"{found.batch:6} {found.context:8} {found.step_s * 1e3:9.3f} {found.tokens_per_s:10.1f} {found.prefill_s:9.2f}"
    )
    if rate and found.step_bytes:
        floor = found.step_bytes / rate
        line += f" {found.step_bytes / 1e9:8.2f} {floor * 1e3:9.3f} {floor / found.step_s:8.0%}"
    return line


HEADER = (
    f"{'batch':>6} {'context':>8} {'ms/step':>9} {'tokens/s':>10} {'prefill s':>9} "
    f"{'GB/step':>8} {'floor ms':>9} {'of copy':>8}"
)
