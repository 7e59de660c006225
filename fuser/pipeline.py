"""From an imported graph to a fused one, each stage timed and reported: what all front doors share."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from fuser import explanation, patterns
from fuser.canonicalize import canonicalize
from fuser.constants import Outline
from fuser.errors import VerificationError
from fuser.graph import Graph
from fuser.layers import Step
from fuser.quantized import Codes, Quantized
from fuser.quantizing import Choices, quantized
from fuser.report import Report
from fuser.rewriting import rewrite
from fuser.verification import Role, roles

KEPT = 1024  # elements of the constants that say something of shapes and axes
Progress = Callable[[str], None]


@contextmanager
def stage(report: Report, name: str, note: Progress) -> Iterator[None]:
    """Times what is done within under a stage's name."""
    note(name)
    start = perf_counter()
    try:
        yield
    finally:
        report.stages_s[name] = report.stages_s.get(name, 0.0) + perf_counter() - start


def outlined(graph: Graph) -> Graph:
    """A copy of a graph as it was read, for its diff: it keeps no weights alive."""
    copy, outlines = graph.clone(), dict[int, Outline]()
    for value in copy.constants():
        constant = value.constant
        if constant is not None and constant.size > KEPT:
            made = Outline(constant.dtype, constant.shape, constant.stored_bytes)
            value.constant = outlines.setdefault(id(constant), made)
    return copy


def canonicalized(graph: Graph, report: Report, note: Progress) -> None:
    """Brings a graph as an exporter wrote it into canonical form."""
    with stage(report, "canonicalize", note):
        canonicalize(graph)


def quantization(
    graph: Graph, choices: Choices, report: Report, note: Progress, device: torch.device | None = None
) -> Graph:
    """A canonical graph with its weights quantized, one after another, on a device or where they are."""
    errors: dict[str, list[float]] = {}

    def record(weight: Tensor, codes: Codes) -> None:
        wide = weight.float()
        error, norm = (codes.weight.to(wide.device) - wide).norm(), wide.norm()
        errors.setdefault(str(codes.format), []).append(float(error / norm) if norm else 0.0)

    with stage(report, "quantize", note):
        made = quantized(
            graph, choices, device=device, progress=lambda name: note(f"quantize {name}"), record=record
        )  # fmt: skip
    report.weight_errors = {format: sum(found) / len(found) for format, found in errors.items()}
    return made


def rewritten(graph: Graph, before: list[Step], report: Report, note: Progress, *, verify: bool) -> None:
    """Fuses a canonical graph; `before` are the steps of the graph as it came, for the explanation."""
    start = perf_counter()
    note("fuse")
    outcome = rewrite(graph, patterns.ALL, verify=verify)
    report.fused, report.misses = outcome.fused, outcome.misses
    report.quantized = _formats(graph)
    report.checked, report.reused = outcome.checked, outcome.reused
    report.explanation = explanation.explain(report.model, report.nodes_before, before, outcome)
    parts = {"recognize": outcome.recognize_s, "match": outcome.match_s, "check": outcome.check_s}
    report.stages_s |= parts
    report.stages_s["rewrite"] = max(0.0, perf_counter() - start - sum(parts.values()))


def _formats(graph: Graph) -> dict[str, int]:
    """How many weights are held as codes of each format."""
    held = {
        id(leaf): leaf for value in graph.constants() if value.constant is not None for leaf in value.constant.leaves()
    }
    return dict(Counter(str(leaf.format) for leaf in held.values() if isinstance(leaf, Quantized)))


def input_roles(graph: Graph) -> tuple[list[Role], str]:
    """What a canonical graph's inputs are for, or the reason why inputs cannot be made."""
    try:
        return roles(graph), ""
    except VerificationError as error:
        return [], str(error)


def weight_bytes(graph: Graph) -> int:
    """Bytes of all distinct constants."""
    distinct = {id(value.constant): value.constant for value in graph.constants() if value.constant is not None}
    return sum(constant.stored_bytes for constant in distinct.values())
