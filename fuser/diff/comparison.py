"""Making a diff: of a graph and what was fused in it, by the record of that, or of any two ONNX files."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuser.diff import alignment as aligning
from fuser.diff.alignment import Alignment, Record, Stands
from fuser.diff.document import Document, Miss, Pattern, Region, shown
from fuser.diff.folding import folding, layers_of
from fuser.diff.sides import Modules, side
from fuser.diff.structure import Structure, Table
from fuser.diff.summary import Sizes, saving, summary
from fuser.errors import InputError, UsageError
from fuser.exporter import write_text
from fuser.fused import REGISTRY
from fuser.graph import FUSER, Graph, Node
from fuser.importer import from_proto, read_model
from fuser.layers import Layers, steps
from fuser.report import Report
from fuser.shapes import infer

FORMATS = ("html", "svg", "text", "json")
ENDINGS = {".html": "html", ".htm": "html", ".svg": "svg", ".txt": "text", ".diff": "text", ".json": "json"}
ABOUT = {
    aligning.REWRITTEN: "Several nodes as one, an identity of the canonical form.",
    aligning.REPLACED: "What stands between the same neighbours in both files; nothing is recorded of it.",
}


@dataclass
class Diff:
    """Two graphs, and what of one is what of the other; `document` is the data of every form."""

    document: Document

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; docs/diff.md says what it holds."""
        return self.document.to_json()

    def text(self, *, colour: bool = False) -> str:
        """A unified diff, layer by layer, for a terminal (in colour) or a pull request."""
        from fuser.diff.text import text

        return text(self.document, colour=colour)

    def svg(self) -> str:
        """A drawing of both sides, repeated layers once."""
        from fuser.diff.svg import svg

        return svg(self.document)

    def html(self) -> str:
        """One page that needs nothing else: it explores both graphs."""
        from fuser.diff.html import html

        return html(self.document)

    def form(self, name: str) -> str:
        """The diff as `html`, `svg`, `text` or `json`."""
        forms: dict[str, Callable[[], str]] = {
            "html": self.html,
            "svg": self.svg,
            "text": lambda: self.text() + "\n",
            "json": lambda: json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n",
        }
        return forms[name]()

    def save(self, path: str | os.PathLike[str], *, form: str | None = None) -> None:
        """Writes the diff to `path`, whole or not at all.

        Args:
            form: html, svg, text or json; by default what the name ends in says.

        Raises:
            UsageError: no such form.
            OutputError: the file cannot be written.
        """
        write_text(Path(path), self.form(form_of(path, form)))

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame that may run its script, and nothing else."""
        import html

        page = html.escape(self.html())
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width: 100%; height: 640px; border: 0"></iframe>'
        )


def form_of(path: str | os.PathLike[str], form: str | None = None) -> str:
    """The form of a file: what was asked for, else what its name ends in.

    Raises:
        UsageError: neither is a form.
    """
    if form is None:
        found = ENDINGS.get(Path(path).suffix.lower())
        if found is None:
            raise UsageError(f"'{path}' ends in no form of a diff; give one of {', '.join(ENDINGS)}, or a format")
        return found
    if form not in FORMATS:
        raise UsageError(f"a diff has no format '{form}'; formats are {', '.join(FORMATS)}")
    return form


def of_files(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> Diff:
    """The diff of two ONNX files, which are read and not run.

    Raises:
        InputError: one of them cannot be read or is not supported.
    """
    table = Table()
    first, second = (Structure(_read(Path(path)), table) for path in (before, after))
    _infer(first.graph, second.graph)
    return _diff((Path(before).name, Path(after).name), first, second, aligning.compared(first, second))


def of_fused(read: Graph, fused: Graph, report: Report) -> Diff:
    """The diff of a graph as it was read, its nodes those of the report's explanation, and what was fused in it."""
    assert report.explanation is not None
    table = Table()
    first, second = Structure(read, table), Structure(fused, table)
    _infer(first.graph)
    lines = {(c.kind, c.sources): (c.line, c.error) for c in report.explanation.constructs if c.reason is None}

    def record(node: Node) -> Record | None:
        operator = REGISTRY.get(node.op) if node.domain == FUSER else None
        if operator is None:
            return None
        kind = operator.kind_of(node)
        line, error = lines.get((kind, node.origin.sources), ("", None))
        return Record(kind, line or operator.recognizer_line, error)

    sources = {name: number for number, node in enumerate(first.nodes) for name in node.origin.sources or (node.name,)}
    alignment = aligning.recorded(first, second, sources, record)
    return _diff((Path(report.model).name, report.target), first, second, alignment, report)


def _read(path: Path) -> Graph:
    """The graph in a file; calls of the functions that fuser writes stay calls, others are inlined."""
    model = read_model(path)
    others = [function for function in model.functions if function.domain != FUSER]
    del model.functions[:]
    model.functions.extend(others)
    return from_proto(model, path.parent, None, path)


def _infer(*graphs: Graph) -> None:
    """Types and shapes, for reading: a graph that does not fit together is shown as it is."""
    for graph in graphs:
        try:
            infer(graph)
        except InputError:
            continue


def _diff(
    names: tuple[str, str], before: Structure, after: Structure, alignment: Alignment, report: Report | None = None
) -> Diff:
    taken = steps(before.graph), steps(after.graph)
    layers = layers_of(taken[0]) if report is None or report.explanation is None else report.explanation.layers
    folded = folding(before, after, taken, layers, alignment)
    sizes = Sizes(before.graph), Sizes(after.graph)
    modules, patterns = Modules(), _Patterns()
    made = Document(
        " -> ".join(map(shown, names)),
        side(names[0], before, folded, 0, modules),
        side(names[1], after, folded, 1, modules),
        summary(before, after, sizes, folded, layers, report),
        modules.names,
        patterns.rows,
    )
    for region in alignment.regions:
        saved = "" if region.kind == aligning.REWRITTEN else saving(region, before, after, sizes[0])
        pattern = patterns.index(region.kind, after.nodes[region.after[0]], region.line)
        made.regions.append(Region(pattern, region.after, region.before, _note(region, after, report), saved))
    made.pairs = alignment.pairs
    made.changed = [change._replace(text=shown(change.text)) for change in alignment.changed]
    made.misses = _misses(report, layers, patterns) if report is not None else []
    return Diff(made)


def _note(region: Stands, after: Structure, report: Report | None) -> str:
    """How it is known that a region computes the same."""
    if not region.recorded or report is None:
        return ""
    if region.error is not None:
        return f"checked, error {region.error:.1e}"
    operator = REGISTRY.get(after.nodes[region.after[0]].op)
    if region.kind == aligning.REWRITTEN or operator is None:
        return ""
    return "recognised by what it holds" if operator.recognizer is not None else "not checked"


class _Patterns:
    """The table of patterns; what one operator is counted as by several lines is several."""

    def __init__(self) -> None:
        self.rows: list[Pattern] = []
        self._indices: dict[tuple[str, str], int] = {}

    def index(self, kind: str, node: Node | None, line: str) -> int:
        if (kind, line) not in self._indices:
            self._indices[kind, line] = len(self.rows)
            operator = REGISTRY.get(node.op if node is not None else kind)
            about = ABOUT.get(kind) or (_sentence(operator.__doc__) if operator is not None else "")
            self.rows.append(Pattern(shown(kind), about, line))
        return self._indices[kind, line]

    def missed(self, kind: str) -> int:
        """The pattern of a near miss: the first one of its kind."""
        known = [number for (name, _), number in self._indices.items() if name == kind]
        return known[0] if known else self.index(kind, None, "")


def _sentence(text: str | None) -> str:
    """The first sentence of a docstring."""
    words = " ".join((text or "").split("\n\n")[0].split())
    return shown(words.partition(". ")[0].rstrip("."))


def _misses(report: Report, layers: Layers, patterns: _Patterns) -> list[Miss]:
    numbers = {source: number for number, step in enumerate(layers.steps) for source in step.sources}
    made = []
    for miss in report.misses:
        at = [next((numbers[name] for name in place.at if name in numbers), -1) for place in miss.places]
        if at[0] >= 0:
            also = tuple(number for number in at[1:] if number >= 0)
            made.append(
                Miss(patterns.missed(miss.fusion), at[0], shown(miss.expected), shown(miss.found), miss.line, also)
            )
    return made
