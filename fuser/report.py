"""What was fused, what was not, and why: as data, and as text a person reads."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fuser.explanation import DIFFERENCE, KINDS, Construct, Explanation, Group, Reason, layer_json, layer_of
from fuser.layers import Layer
from fuser.matching import CHECK
from fuser.quality import Measured
from fuser.rewriting import Miss
from fuser.verification import Verification

VERSION = 1
WIDTH = 100
REASONS = 10  # that are shown unless all are asked for


@dataclass
class Report:
    """The record of one run; `to_json` is the content of `report.json`."""

    model: str
    target: str
    nodes_before: int = 0
    nodes_after: int = 0
    weights_bytes_before: int = 0
    weights_bytes_after: int = 0
    quantized: dict[str, int] = field(default_factory=dict)  # weights by format
    weight_errors: dict[str, float] = field(
        default_factory=dict
    )  # by format, the mean of |rounded - weight| / |weight|
    measured: Measured | None = None  # what quantizing costs, where there is a text
    notes: list[str] = field(default_factory=list)  # what the target has no operators for
    fused: dict[str, int] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    checked: int = 0
    reused: int = 0
    stages_s: dict[str, float] = field(default_factory=dict)
    verification: Verification = field(default_factory=Verification)
    explanation: Explanation | None = None

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
            "quantized": dict(sorted(self.quantized.items())),
            "weight_errors": dict(sorted(self.weight_errors.items())),
            "quality": None if self.measured is None else self.measured.to_json(),
            "notes": self.notes,
            "fusions": {
                name: {"fused": self.fused.get(name, 0), "missed": missed.get(name, 0)}
                for name in sorted({*self.fused, *missed})
            },
            "misses": [self._miss_json(miss) for miss in self.misses],
            "checks": {"evaluated": self.checked, "reused": self.reused},
            "stages_s": {name: round(seconds, 4) for name, seconds in self.stages_s.items()},
            "verification": self.verification.to_json(),
        }

    def _miss_json(self, miss: Miss) -> dict[str, Any]:
        layers = None if self.explanation is None else self.explanation.layers
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
            "reason": KINDS[miss.rank],
            "places": [
                {"module": place.module, "node": place.node}
                | layer_json(None if layers is None else layer_of(place, layers))
                for place in miss.places
            ],
        }

    def text(self, *, misses: int = 5) -> str:
        """The report for people; at most `misses` near misses."""
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
        if self.quantized:
            formats = [f"{count} in {name}{self._off(name)}" for name, count in sorted(self.quantized.items())]
            lines.append(f"  codes    {', '.join(formats)}")
        if self.measured is not None:
            lines.append(f"  quality  {self.measured}")
        lines += [f"  note     {note}" for note in self.notes]
        lines.append(
            f"  checks   {self.checked} rewrites checked numerically, {self.reused} more of the same structure"
        )
        lines.append(f"  result   {self._verdict()}")
        lines.append("  time     " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages_s.items()))
        if self.misses and misses:
            lines += ["", *self._miss_lines(misses)]
        return "\n".join(lines)

    def _off(self, format: str) -> str:
        """How far weights in a format are from what they were."""
        return f" (off by {self.weight_errors[format]:.2%})" if format in self.weight_errors else ""

    def _verdict(self) -> str:
        found = self.verification
        if found.skipped:
            return f"not compared end to end: {found.skipped}"
        worst = found.max_relative_error
        if worst is None:
            return "not compared end to end"
        verdict = "equal" if found.passed else "DIFFERENT"
        return f"{verdict} within {worst:.1e} (relative; {', '.join(found.cases)})"

    def _miss_lines(self, limit: int) -> list[str]:
        lines: list[str] = []
        shown = self.misses[:limit]
        for miss in shown:
            lines += [*miss_lines(miss), ""]
        if len(shown) < len(self.misses):
            lines.append(f"{len(self.misses) - len(shown)} more kinds of near miss; --explain shows them")
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


def explanation_text(explanation: Explanation, *, everything: bool = False) -> str:
    """An explanation for people, layer by layer; with `everything`, each reason and each place of it."""
    width = max((len(construct.kind) for construct in explanation.constructs), default=0)
    layers = len(explanation.layers.all)
    title = [explanation.model, _count(explanation.nodes, "node"), *([_count(layers, "layer")] if layers else [])]
    lines = ["   ".join(title)]
    for group in explanation.groups:
        lines += ["", *_group_lines(explanation, group, width)]
    outside = [construct for construct in explanation.constructs if construct.layer is None]
    if outside:
        lines += ["", "outside the layers" if layers else "what was found"]
        lines += _row_lines(explanation, _rows(explanation, outside), width)
    return "\n".join([*lines, "", *_reason_lines(explanation, everything)])


_Row = tuple[str, Reason | None]  # a kind of construct, and why it is missed


def _rows(explanation: Explanation, constructs: Iterable[Construct]) -> dict[_Row, list[str]]:
    """The modules of each kind of construct, kinds as they come in the graph."""
    rows: dict[_Row, list[str]] = {}
    for construct in constructs:
        rows.setdefault((construct.kind, construct.reason), []).append(explanation.layers.within(construct.module))
    return rows


def _row_lines(explanation: Explanation, rows: Mapping[_Row, Sequence[str]], width: int) -> list[str]:
    lines: list[str] = []
    for (kind, reason), modules in rows.items():
        if reason is not None:
            lines.append(f"  {kind:<{width}}   missed: see {explanation.reasons.index(reason) + 1}")
            continue
        where = ", ".join(dict.fromkeys(module for module in modules if module))
        lines += _wrapped(f"  {kind:<{width}} {len(modules):>3}   ", where)
    return lines


def _group_lines(explanation: Explanation, group: Group, width: int) -> list[str]:
    """What is in some layers: all of it, or how they are not like the usual ones."""
    rows = _rows(explanation, group.constructs)
    usual = {} if group.usual is None else _rows(explanation, group.usual.constructs)
    other = {row: modules for row, modules in rows.items() if usual.get(row) != modules}
    differing = [
        f"  {'':<{width}}   different: see {explanation.reasons.index(reason) + 1}"
        for reason in explanation.differing(group.layers[0])
    ]
    if group.usual is None or 2 * len(other) > len(rows):
        stack = group.layers[0].stack
        heading = _layers(group.layers) + (f"   {stack}.*" if stack else "")
        return [heading, *_row_lines(explanation, rows, width), *differing]
    kinds = {kind for kind, _ in rows}
    none = [f"  {kind:<{width}}   0" for kind, reason in usual if reason is None and kind not in kinds]
    heading = f"{_layers(group.layers)}   like {_layers(group.usual.layers)}, but"
    return [heading, *_row_lines(explanation, other, width), *none, *differing]


def _reason_lines(explanation: Explanation, everything: bool) -> list[str]:
    reasons = explanation.reasons
    shown = reasons if everything else reasons[:REASONS]
    if not reasons:
        return ["no near misses"]
    missed = any(reason.missed for reason in reasons)
    lines = ["near misses, the likeliest first" if missed else "no near misses, but layers unlike the others"]
    for number, reason in enumerate(shown, 1):
        lines += ["", *_reason_text(number, reason, everything)]
    if len(shown) < len(reasons):
        lines += ["", f"{len(reasons) - len(shown)} more: --all shows them"]
    return lines


def _reason_text(number: int, reason: Reason, everything: bool) -> list[str]:
    first, *others = reason.spots
    found_in = [spot.layer for spot in reason.spots if spot.layer is not None]
    missed, layers = ", ".join(reason.missed), _layers(found_in) if found_in else ""
    heading = f"{missed}   {layers}" if missed and layers else missed or f"{layers}, fused all the same"
    where = [f"{reason.matched} of {reason.total} nodes", reason.line] if reason.line else []
    where += [f"at {first.module}"] if first.module else []
    where += [f"and {_count(len(others), 'more place')}"] if others else []
    expected = {"check": "refused", DIFFERENCE: "others"}.get(reason.kind, "expected")
    known = any(name in reason.found for name in reason.at)
    lines = [f"{number:>2}  {heading}"]
    lines += _wrapped("    ", "   ".join(where)) if where else []
    lines += _wrapped(f"    {expected:<8}  ", reason.expected)
    lines += _wrapped("    found     ", reason.found + ("" if known else f"  (node {first.node})"))
    lines += _wrapped("    others    ", reason.others) if reason.others else []
    if everything and others:
        lines += [f"    also      {spot.node}" + (f"   at {spot.module}" if spot.module else "") for spot in others]
    return lines


def _layers(layers: Iterable[Layer]) -> str:
    """`layers 0-2, 5`."""
    spans: list[list[int]] = []
    for index in sorted({layer.index for layer in layers}):
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    text = ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in spans)
    return f"layer {text}" if text.isdecimal() else f"layers {text}"


def _wrapped(prefix: str, text: str) -> list[str]:
    """Text behind a prefix, further lines beneath its beginning."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=" " * len(prefix),
        break_on_hyphens=False,
        break_long_words=False,
    ) or [prefix.rstrip()]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
