"""What was fused, what was not, and why: as data, and as text a person reads."""

from dataclasses import dataclass, field
from typing import Any

from fuser.matching import CHECK
from fuser.rewriting import Miss
from fuser.verification import Verification

VERSION = 1


@dataclass
class Report:
    """The record of one run; `to_json` is the content of `report.json`."""

    model: str
    target: str
    nodes_before: int = 0
    nodes_after: int = 0
    weights_bytes_before: int = 0
    weights_bytes_after: int = 0
    fused: dict[str, int] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    checked: int = 0
    reused: int = 0
    stages_s: dict[str, float] = field(default_factory=dict)
    verification: Verification = field(default_factory=Verification)

    @property
    def missed(self) -> dict[str, int]:
        """How many near misses each fusion has."""
        counts: dict[str, int] = {}
        for miss in self.misses:
            counts[miss.fusion] = counts.get(miss.fusion, 0) + miss.count
        return counts

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `version` changes when its meaning does."""
        missed = self.missed
        return {
            "version": VERSION,
            "model": self.model,
            "target": self.target,
            "nodes": {"before": self.nodes_before, "after": self.nodes_after},
            "weights_bytes": {"before": self.weights_bytes_before, "after": self.weights_bytes_after},
            "fusions": {
                name: {"fused": self.fused.get(name, 0), "missed": missed.get(name, 0)}
                for name in sorted({*self.fused, *missed})
            },
            "misses": [_miss_json(miss) for miss in self.misses],
            "checks": {"evaluated": self.checked, "reused": self.reused},
            "stages_s": {name: round(seconds, 4) for name, seconds in self.stages_s.items()},
            "verification": self.verification.to_json(),
        }

    def text(self, *, misses: int | None = 5) -> str:
        """The report for people; at most `misses` near misses (None: all of them)."""
        lines = [f"{self.model}  ->  {self.target}", ""]
        missed = self.missed
        width = max((len(name) for name in {*self.fused, *missed}), default=0)
        for name in sorted({*self.fused, *missed}, key=lambda n: (-self.fused.get(n, 0), n)):
            count = missed.get(name, 0)
            near = f", {count} near miss{'es' if count != 1 else ''}" if count else ""
            lines.append(f"  {name:<{width}}  {self.fused.get(name, 0):>4} fused{near}")
        if not self.fused and not missed:
            lines.append("  nothing to fuse was found")
        lines += ["", f"  nodes    {self.nodes_before} -> {self.nodes_after}"]
        lines.append(f"  weights  {size(self.weights_bytes_before)} -> {size(self.weights_bytes_after)}")
        lines.append(
            f"  checks   {self.checked} rewrites checked numerically, {self.reused} more of the same structure"
        )
        lines.append(f"  result   {self._verdict()}")
        lines.append("  time     " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages_s.items()))
        if self.misses:
            lines += ["", *self._miss_lines(misses)]
        return "\n".join(lines)

    def _verdict(self) -> str:
        found = self.verification
        if found.skipped:
            return f"not compared end to end: {found.skipped}"
        worst = found.max_relative_error
        if worst is None:
            return "not compared end to end"
        verdict = "equal" if found.passed else "DIFFERENT"
        return f"{verdict} within {worst:.1e} (relative; {', '.join(found.cases)})"

    def _miss_lines(self, limit: int | None) -> list[str]:
        lines: list[str] = []
        shown = self.misses if limit is None else self.misses[:limit]
        for miss in shown:
            lines += [*miss_lines(miss), ""]
        if len(shown) < len(self.misses):
            lines.append(f"{len(self.misses) - len(shown)} more kinds of near miss; --explain shows all")
        return lines[:-1] if lines and not lines[-1] else lines


def miss_lines(miss: Miss) -> list[str]:
    """A near miss as text: the pattern line, the place, what was expected and what was found."""
    where = f" at {miss.module}" if miss.module else ""
    times = f", and {miss.count - 1} more like it" if miss.count > 1 else ""
    return [
        f"{miss.fusion}: near miss{times}",
        f"  {miss.matched} of {miss.total} nodes{where}   {miss.line}",
        f"  {'' if miss.rank == CHECK else 'expected '}{miss.expected}",
        f"  found    {miss.found}" + ("" if f" at {miss.node}" in miss.found else f"  (node {miss.node})"),
    ]


def _miss_json(miss: Miss) -> dict[str, Any]:
    return {
        "fusion": miss.fusion,
        "count": miss.count,
        "module": miss.module,
        "node": miss.node,
        "matched": miss.matched,
        "total": miss.total,
        "pattern": miss.line,
        "expected": miss.expected,
        "found": miss.found,
        "reason": ("check", "escape", "structure")[miss.rank],
    }


def size(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
