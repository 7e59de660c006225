"""The operator table of a step: what each operator takes before and after fusion, beside what the machine can do at most."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

Call = Callable[[int], object]
Clock = Callable[[Call, int], float]  # microseconds of one call, on rotating sets of inputs


@dataclass(frozen=True)
class Measure:
    """One operator, repeated layers averaged.

    Attributes:
        name: what it is for.
        count: how many layers of the model have it.
        us: microseconds of one.
        bytes: that it has to read and write; flops: a multiply-add is two.
        launches: operators or kernels that it takes.
    """

    name: str
    count: int
    us: float
    bytes: float
    flops: float
    launches: int = 1

    @property
    def gb_s(self) -> float:
        return self.bytes / self.us / 1e3 if self.us else 0.0

    @property
    def tflops(self) -> float:
        return self.flops / self.us / 1e6 if self.us else 0.0


@dataclass
class Profile:
    """A decode step of `batch` sequences of `context` tokens on a device.

    Attributes:
        copy_gb_s, product_tflops: what the device reaches, measured in the same run.
        before, after: operators in order; names say what they are for.
        step_us: a step after fusion, its launches in a row: those of the layers that were made, and the others' by their rows.
        predicted_us: what was predicted of it, where the device is one that is known.
    """

    model: str
    device: str
    dtype: str
    batch: int
    context: int
    copy_gb_s: float
    product_tflops: float
    before: list[Measure]
    after: list[Measure]
    step_us: float | None = None
    predicted_us: float | None = None

    def share_of_ceiling(self, one: Measure) -> float:
        """Of the copy's bandwidth or the product's rate, whichever it is nearer to."""
        return max(one.gb_s / self.copy_gb_s, one.tflops / self.product_tflops)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; microseconds, bytes, FLOPs."""

        def rows(side: list[Measure]) -> list[dict[str, Any]]:
            total = step_us(side)
            return [
                vars(one) | {
                    "share": one.count * one.us / total, "gb_s": one.gb_s, "tflops": one.tflops,
                    "ceiling": self.share_of_ceiling(one),
                }
                for one in side
            ]  # fmt: skip

        told = {name: value for name, value in vars(self).items() if name not in ("before", "after")}
        steps = {"before_us": step_us(self.before), "after_us": step_us(self.after)}
        return told | steps | {"before": rows(self.before), "after": rows(self.after)}

    def text(self) -> str:
        """Both tables."""
        ceilings = f"ceilings: copy {self.copy_gb_s:.0f} GB/s, product {self.product_tflops:.3g} TFLOP/s"
        title = f"{self.model} on {self.device}, {self.dtype}, batch {self.batch}, context {self.context}; {ceilings}"
        lines = [title]
        for side, rows in (("before fusion", self.before), ("after fusion", self.after)):
            total = step_us(rows)
            lines += ["", f"{side}: {total / 1e3:.3f} ms, {sum(r.count * r.launches for r in rows)} launches", HEADER]
            lines += [self._line(one, total) for one in rows]
        if self.step_us is not None:
            lines += ["", f"the step in a row: {self.step_us / 1e3:.3f} ms"]
        return "\n".join(lines)

    def _line(self, one: Measure, total: float) -> str:
        share = one.count * one.us / total
        return (
            f"{one.name:>34} {one.count:5} {one.launches:8} {one.us:9.1f} {share:6.1%} {one.bytes / 1e6:9.3g} "
            f"{one.flops / 1e9:8.3g} {one.gb_s:7.3g} {one.tflops:7.3g} {self.share_of_ceiling(one):8.0%}"
        )


HEADER = (
    f"{'':>34} {'times':>5} {'launches':>8} {'us':>9} {'share':>6} {'MB':>9} {'GFLOP':>8} {'GB/s':>7} {'TF/s':>7} "
    f"{'ceiling':>8}"
)


def step_us(side: list[Measure]) -> float:
    """Microseconds of all operators, each as often as a step has it."""
    return sum(one.count * one.us for one in side)


def timed(
    call: Call, sets: int, *, repeats: int = 5, least_s: float = 0.02, of: Callable[..., float] = median
) -> float:
    """Microseconds of one call on the CPU: the median of rounds over all sets (`of`), each long enough to be timed."""
    for i in range(sets):
        call(i)
    start = perf_counter()
    call(0)
    rounds = max(1, int(least_s / max((perf_counter() - start) * sets, 1e-7)))
    found = []
    for _ in range(repeats):
        start = perf_counter()
        for _ in range(rounds):
            for i in range(sets):
                call(i)
        found.append((perf_counter() - start) / (rounds * sets) * 1e6)
    return of(found)


def cpu_ceilings(threads: int) -> tuple[float, float]:
    """GB/s of a copy (bytes read and written) and TFLOP/s of a float32 product, by torch, on so many threads: the best seen.

    What a cache holds is read faster than it is copied.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = 64 << 20
        source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        copy = 2 * size / timed(lambda i: target.copy_(source), 1, repeats=7, of=min) / 1e3
        a, b = torch.randn(768, 768), torch.randn(768, 768)
        return copy, 2 * 768**3 / timed(lambda i: a @ b, 1, repeats=7, of=min) / 1e6
    finally:
        torch.set_num_threads(before)
