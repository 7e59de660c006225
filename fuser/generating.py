"""What `fuse generate` prints: text as it comes, or results as JSON, and what the engine did."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Any

from fuser.errors import UsageError
from fuser.llm import LLM, Prompt, Result
from fuser.runtime.parameters import SamplingParams

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of a line of levels


def generate(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, say: Callable[[str], None]) -> dict[str, Any]:
    """Generates, and says the text of one sample as it comes, of several once all are done.

    Returns:
        The results and the statistics, as JSON takes them.

    Raises:
        UsageError: a request cannot be.
    """
    start = perf_counter()
    stream = llm.stream(list(prompts), params)
    if stream.refused:
        raise UsageError(str(stream.refused[0]))
    only = len(stream.results) == 1
    first: float | None = None
    for chunk in stream:
        if first is None:
            first = perf_counter() - start
        if only:
            say(chunk.text if llm.tokenizer is not None else "".join(f"{token} " for token in chunk.token_ids))
    took = perf_counter() - start
    if only:
        say("\n")
    else:
        for result in stream.results:
            say(f"--- {result.request_id}, sample {result.index}: {result.finish_reason}\n{_text(llm, result)}\n")
    return {"results": [asdict(result) for result in stream.results], "statistics": statistics(llm, first, took)}


def _text(llm: LLM, result: Result) -> str:
    return result.text if llm.tokenizer is not None else " ".join(map(str, result.token_ids))


def statistics(llm: LLM, first_s: float | None, took_s: float) -> dict[str, Any]:
    """What steps did: times in seconds, batch sizes by step."""
    held = llm.statistics
    gaps = [b - a for a, b in zip(held.finished_s, held.finished_s[1:], strict=False)]
    tokens = held.chosen
    return {
        "time_to_first_token_s": first_s,
        "step_s": median(gaps) if gaps else None,
        "steps": held.steps,
        "tokens": tokens,
        "tokens_per_s": tokens / took_s if took_s else None,
        "pages": llm.engine.pool.pages,
        "most_pages_used": max(held.pages, default=0),
        "preemptions": llm.engine.scheduler.preemptions,
        "reused_tokens": llm.engine.scheduler.reused,
        "batch": list(held.batch),
        "padded": llm.padded,
    }


def statistics_text(found: dict[str, Any]) -> str:
    """The same for people."""

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"

    rate = found["tokens_per_s"]
    batch = found["batch"]
    lines = [
        f"first token  {ms(found['time_to_first_token_s'])}",
        f"step         {ms(found['step_s'])} (median of {found['steps']})",
        f"tokens       {found['tokens']}, {rate:.1f} a second" if rate else f"tokens       {found['tokens']}",
        f"pages        {found['most_pages_used']} of {found['pages']} at most in use, "
        f"{found['preemptions']} preemptions, {found['reused_tokens']} tokens shared",
        f"batch        {levels(batch)}  at most {max(batch, default=0)}",
    ]
    if found["padded"]:
        lines.append(f"padded       {found['padded']}")
    return "\n".join(lines)


def levels(values: Sequence[int]) -> str:
    """Numbers over time as a line of bars; of many, the largest of each part."""
    if not values:
        return ""
    size = -(-len(values) // WIDTH)
    parts = [max(values[i : i + size]) for i in range(0, len(values), size)]
    return "".join(LEVELS[(value * len(LEVELS) - 1) // max(parts)] if value else " " for value in parts)
