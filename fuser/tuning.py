"""Searches configurations of kernels on this machine's GPU, within a time budget, and keeps what was best."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fuser.codegen.attention import Attention
from fuser.codegen.linear import Linear
from fuser.codegen.program import Program
from fuser.codegen.rotary import Rotary
from fuser.codegen.shapes import SHAPES, Shape
from fuser.codegen.tuning import Choice, Problem, Table, record, table_of
from fuser.errors import FuserError, UsageError
from fuser.formats import Format

WRONG = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 1e-5}  # relative errors at which a configuration is not counted
SEQUENCES = ((1, 512), (1, 4096), (1, 32768), (16, 1024), (64, 512), (64, 4096))
Measure = Callable[[Problem, Choice], float]
Say = Callable[[str], None]
Keep = Callable[[dict[str, dict[str, Any]]], object]


@dataclass
class Search:
    """What a search found, and what it cost: its first run compiles, the next takes what was kept."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    left: int = 0  # problems for which there was no time
    compile_s: float = 0.0
    measure_s: float = 0.0

    def text(self) -> str:
        told = f"{len(self.entries)} kernels tuned, {self.tried} configurations tried"
        told += f" ({self.compile_s:.0f} s to compile, {self.measure_s:.0f} s to measure)"
        if self.left:
            told += f"; {self.left} kernels were left for want of time"
        return "\n".join([told, *(f"not counted: {reason}" for reason in self.wrong)])


def standard(
    tokens: Sequence[int],
    dtype: str,
    shapes: Sequence[str],
    kv_group: int = 0,
    formats: Sequence[Format | None] = (None,),
) -> list[Problem]:
    """The launches of well-known models, their weights in each of the formats; with `kv_group` over an int8 cache.

    Raises:
        UsageError: there is no such model.
    """
    found: list[Problem] = []
    for name in shapes:
        if name not in SHAPES:
            raise UsageError(f"there is no shape '{name}'; shapes are {', '.join(SHAPES)}")
        shape = SHAPES[name]
        for count in tokens:
            for format in formats:
                found += [Problem(what) for _, what in shape.linears(count, dtype, kv_group, format)]
            found.append(Problem(shape.vocabulary(count, dtype)))
        found += attentions(shape, dtype, kv_group=kv_group)
    return _distinct(found)


def attentions(shape: Shape, dtype: str, page: int = 16, kv_group: int = 0) -> Iterator[Problem]:
    """Decode attention at lengths and batches near and far, and prefill."""
    what = Attention(shape.H, shape.G, shape.Dh, shape.Dh**-0.5, page, dtype=dtype, kv_group=kv_group)
    yield from (Problem(what, sequences, tokens) for sequences, tokens in SEQUENCES)
    yield Problem(what, 1, 4096, decode=False)


def of_program(program: Program) -> list[Problem]:
    """The kernels of a program that have something to choose."""
    found = []
    for step in program.steps:
        if isinstance(step.what, Attention):
            sizes = SEQUENCES if program.decode else ((1, 4096),)
            found += [Problem(step.what, *size, decode=program.decode) for size in sizes]
        elif isinstance(step.what, Linear):
            found.append(Problem(step.what))
    return _distinct(found)


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    return list({problem.key: problem for problem in problems}.values())


def search(
    problems: Sequence[Problem],
    measure: Measure,
    *,
    seconds: float,
    versions: str,
    say: Say,
    table: Table | None = None,
    keep: Keep | None = None,
) -> Search:
    """Measures candidates of each problem until the time is up, each problem's default first.

    Args:
        measure: microseconds of a choice; infinite where it is wrong.
        versions: what the results were measured with.
        table: what was chosen before; it is measured anew, and so replaced by what is faster alone.
        keep: called with each result as it is found.
    """
    found = Search(left=len(problems))
    began = time.monotonic()
    for number, problem in enumerate(problems, 1):
        share = (seconds - (time.monotonic() - began)) / (len(problems) - number + 1)
        until = time.monotonic() + share
        best: tuple[float, Choice] | None = None
        known = table.chosen(problem) if table is not None else None
        for choice in problem.candidates(known):
            is_needed = best is None or choice == known
            if not is_needed and time.monotonic() > until:
                break
            try:
                took = measure(problem, choice)
            except FuserError:
                continue  # it does not fit
            except Exception as error:  # of the compiler, or of the driver
                found.wrong.append(f"{problem.key} {dict(choice)}: {type(error).__name__}")
                continue
            found.tried += 1
            if took == float("inf"):
                found.wrong.append(f"{problem.key} {dict(choice)}: wrong")
            elif best is None or took < best[0]:
                best = took, choice
        if best is not None:
            found.entries[problem.key] = entry = {"choice": dict(best[1]), "us": round(best[0], 2), "with": versions}
            if keep is not None:
                keep({problem.key: entry})
            say(f"{number}/{len(problems)} {best[0]:8.1f} us  {problem.key}")
        found.left -= 1
        if time.monotonic() - began > seconds:
            break
    found.measure_s = time.monotonic() - began
    return found


def tune(problems: Sequence[Problem], *, seconds: float, say: Say) -> Search:
    """Searches on this machine's GPU and keeps each result, as it is found, in the user's cache folder.

    Raises:
        UsageError: there is no CUDA device.
        OutputError: the cache folder cannot be written.
    """
    import torch
    import triton

    if not torch.cuda.is_available():
        raise UsageError("tuning measures on a CUDA device, and there is none")
    began = time.monotonic()
    say(f"compiling for {len(problems)} kernels")
    _compile(problems, min(seconds / 2, 240.0))
    compiled_s = time.monotonic() - began
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    gpu = torch.cuda.get_device_name()
    found = search(
        problems, Measuring(), seconds=seconds - compiled_s, versions=versions, say=say, table=table_of(gpu),
        keep=partial(record, gpu),
    )  # fmt: skip
    found.compile_s = compiled_s
    return found


class Measuring:
    """Measures choices on the GPU; the inputs of one problem are kept until another one comes."""

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.trial: Any = None

    def __call__(self, problem: Problem, choice: Choice) -> float:
        import torch

        if self.problem is not problem:
            self.problem = self.trial = None  # what the last one held goes first
            torch.cuda.empty_cache()
            self.trial = trial_of(problem)
            self.problem = problem
        kernel = problem.kernel(choice)
        if not self.trial.error(kernel) < WRONG[problem.what.dtype]:
            return float("inf")
        return float(self.trial.took(kernel))


def trial_of(problem: Problem) -> Any:
    """The inputs of a problem on the GPU.

    Raises:
        UsageError: its family is not measured.
    """
    from fuser import trials

    what = problem.what
    if isinstance(what, Linear):
        return trials.linear_trial(what)
    if isinstance(what, Attention):
        return trials.attention_trial(what, problem.sequences, problem.tokens, decode=problem.decode)
    if isinstance(what, Rotary):
        return trials.rotary_trial(what, max(problem.tokens, 1))
    raise UsageError(f"kernels of {type(what).__name__.lower()} are not tuned")


def _compile(problems: Sequence[Problem], seconds: float) -> None:
    """Compiles candidates in several processes: Triton keeps what each of them compiles on disk."""
    jobs = [(problem, choice) for problem in problems for choice in problem.candidates()]
    until = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=context) as pool:
        waiting = [pool.submit(compile_only, problem, choice) for problem, choice in jobs]
        for job in waiting:
            try:
                job.result(timeout=max(until - time.monotonic(), 0.1))
            except Exception:  # what fails here, or takes too long, is told when it is measured
                job.cancel()
        pool.shutdown(cancel_futures=True)  # and waits: what the processes hold of the GPU is needed next


def compile_only(problem: Problem, choice: Choice) -> None:
    """Launches a kernel once, on memory as it is."""
    from fuser import trials

    trials.MOST_SETS, trials.DRAWN = 1, False
    small = problem
    if isinstance(problem.what, Attention):
        small = Problem(problem.what, 1, max(256, int(choice.get("BLOCK_T", 64)) * 2), problem.decode)
    trial = trial_of(small)
    trial.call(problem.kernel(choice))(0)
