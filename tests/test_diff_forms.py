"""The forms of a diff: text, page, drawing, JSON; what a hostile model can do in them (nothing); the commands."""

import base64
import hashlib
import json
import os
import re
import time
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from typer.testing import CliRunner, Result

import fuser
from fuser import exporter
from fuser.cli import app
from fuser.diff import comparison
from fuser.diff.comparison import Diff
from fuser.diff.document import MOST, shown
from tests import models, zoo
from tests.test_diff import DEMO, edited

GOLDEN = Path(__file__).parent / "diffs"


@pytest.fixture(scope="module")
def demo() -> Diff:
    return fuser.fuse(DEMO, verify=False).diff()


def between(before: ModelProto, after: ModelProto, folder: Path) -> Diff:
    paths = [folder / "before.onnx", folder / "after.onnx"]
    for path, model in zip(paths, (before, after), strict=True):
        onnx.save(model, path)
    return comparison.of_files(*paths)


# Text.


@pytest.mark.parametrize("name", ["demo", "edited", "same"])
def test_text(name: str, demo: Diff, tmp_path: Path, update_golden: bool) -> None:
    """What is told, whole; `--update-golden` writes it."""
    model = models.decoder(6)
    others = {"edited": lambda: edited(model, 3)[0], "same": lambda: model}
    diff = demo if name == "demo" else between(model, others[name](), tmp_path)
    text = re.sub(r"\.py:\d+", ".py", diff.text()) + "\n"  # a pattern may move within its file
    assert max(map(len, text.splitlines())) <= 100
    if update_golden:
        (GOLDEN / f"{name}.txt").write_text(text)
    assert text == (GOLDEN / f"{name}.txt").read_text()


def test_colour(demo: Diff) -> None:
    plain, coloured = demo.text(), demo.text(colour=True)
    assert re.sub(r"\033\[\d+m", "", coloured) == plain
    assert "\033" not in plain and "\033[31m- " in coloured and "\033[32m+ " in coloured


# Pages and drawings.

FIXED_TAGS = {"svg", "style", "text", "rect", "g", "polyline", "title"}
FIXED_ATTRIBUTES = {
    "width", "height", "viewBox", "role", "aria-label", "class", "x", "y", "rx", "style", "transform", "points",
}  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, and what its scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[Any, ...]]] = []
        self.held: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        if tag in ("script", "style"):
            self.held.append((dict(attrs).get("type") or tag, ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            kind, text = self.held[-1]
            self.held[-1] = (kind, text + data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", ()))


def test_page(demo: Diff) -> None:
    """One file; its policy lets run what it holds and nothing else, and asks nothing of any network."""
    page = Page(demo.html())
    held = dict(page.held)
    assert json.loads(held["application/json"]) == json.loads(json.dumps(demo.to_json()))
    metas = [dict(attributes) for tag, attributes in page.tags if tag == "meta"]
    policy = next(meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")

    def hashed(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{hashed(held['module'])}'"
    assert rules["style-src"] == f"'sha256-{hashed(held['style'])}'"
    assert [tag for tag, _ in page.tags].count("script") == 2
    names = {name for _, attributes in page.tags for name, _ in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "srcset", "style")]
    assert "{{" not in re.sub(r"<script.*</script>", "", demo.html(), flags=re.DOTALL)


def test_page_is_found_where_it_is_installed() -> None:
    """Scripts, style and template are of the package."""
    page = Path(comparison.__file__).parent / "page"
    assert {"page.html", "viewer.js", "viewer.css"} <= {file.name for file in page.iterdir()}


def test_notebooks(demo: Diff) -> None:
    """A frame of its own origin: the page's script runs in it and reaches nothing outside."""
    (frame,) = [dict(attributes) for tag, attributes in Page(demo._repr_html_()).tags if tag == "iframe"]
    assert frame["sandbox"] == "allow-scripts" and frame["srcdoc"] == demo.html()


def drawn(text: str) -> list[ElementTree.Element]:
    """The elements of a drawing, which are of the kinds that it may have."""
    found = list(ElementTree.fromstring(text).iter())
    for element in found:
        assert element.tag.removeprefix("{http://www.w3.org/2000/svg}") in FIXED_TAGS
        assert set(element.attrib) <= FIXED_ATTRIBUTES
        assert re.fullmatch(r"(fill|stroke|hsl|[\d\s%.:;()/])*", element.get("style", ""))
    return found


def test_drawing(demo: Diff) -> None:
    elements = drawn(demo.svg())
    words = {element.text for element in elements}
    assert {"model.layers.1-4  × 4", "skip_rms_norm", "before", "after", "operators: 420 → 55"} <= words
    coloured = [element for element in elements if element.get("style") and element.get("class") == "node"]
    assert len(coloured) > 100


# What a model may hold.

HOSTILE = [
    "</script><script>document.title='ran'</script>", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>", "<svg/onload=alert(1)//", "javascript:alert(1)", "data:text/html,<script>alert(1)</script>",
    "\" onmouseover=\"alert(1)", "' onfocus='alert(1)' autofocus='", "<!--<script>", "--><script>alert(1)</script>",
    "]]><script>alert(1)</script>", "<![CDATA[<script>alert(1)</script>]]>", "<?xml version='1.0'?><!DOCTYPE x>",
    "<!ENTITY x SYSTEM 'file:///etc/passwd'>&x;", "&lt;script&gt;", "&#60;script&#62;", "\\u003cscript\\u003e",
    "${alert(1)}", "{{constructor.constructor('alert(1)')()}}", "{{document}}", "{{script}}", "{{csp}}", "`alert(1)`",
    "</style><style>*{display:none}</style>", "</title><script>alert(1)</script>", "<iframe srcdoc='<script>'>",
    "<a href=javascript:alert(1)>x</a>", "<base href=//evil>", "<meta http-equiv=refresh content=0>",
    "a\0b", "\u202egnp.exe\u2066", "\u2028\u2029", "\ufeff\u200b\u200d", "\033[31mred\033[0m\033]0;title\007", "a\r\nb\tc",
    "😀👩‍💻", "e" + "\u0301" * 50, "__proto__", "constructor", "../../etc/passwd", "\udbff".encode("utf-8", "replace").decode(),
    "🏴" + "\U000e0067\U000e0062", "x" * 1_000_000, "<script>" * 50_000, "_" * 300_000, "9" * 5_000, "layers." + "1." * 9_000,
]  # fmt: skip


def hostile_model(texts: list[str]) -> ModelProto:
    """Texts in all the places that a model has for them: nodes, values, domains, attributes, dims, metadata, weights."""
    nodes, last = [], texts[0] + "in"
    for number, text in enumerate(texts):
        output = f"{text} {number}"
        node = helper.make_node(
            text or "Op", [last, f"{text} weight"], [output], name=f"{text}{number}", domain=text + "."
        )
        node.attribute.append(helper.make_attribute("text", text))
        node.attribute.append(helper.make_attribute(text or "a", [1, 2]))
        node.doc_string = text
        scopes = repr(["", f"model.{text}.layers.{number}", ""])
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        node.metadata_props.add(key="fuser.sources", value=f"{text}{number}, {text}")
        nodes.append(node)
        last = output
    shape = [texts[0], texts[1], 3]
    given = helper.make_tensor_value_info(texts[0] + "in", TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)
    weights = [helper.make_tensor(f"{text} weight", TensorProto.FLOAT, [1], [1.0]) for text in texts]
    graph = helper.make_graph(nodes, texts[0], [given], [made], weights)
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(text + ".", 1) for text in texts)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name=texts[0], doc_string=texts[1])
    model.metadata_props.add(key=texts[0], value=texts[1])
    return model


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Diff:
    assert len(set(HOSTILE)) >= 40
    first, second = hostile_model(HOSTILE), hostile_model(HOSTILE)
    second.graph.node[5].op_type = "<script>alert(2)</script>"
    del second.graph.node[-1]
    second.graph.output[0].name = second.graph.node[-1].output[0]
    return between(first, second, tmp_path_factory.mktemp("hostile"))


def test_what_is_shown() -> None:
    assert shown("a\0b\nc\u202ed\x1b") == "a\\x00b\\nc\\u202ed\\x1b"
    assert shown("<b>&\"'") == "<b>&\"'" and shown("é😀 漢") == "é😀 漢"
    assert shown("x" * 1000) == "x" * MOST + "…" and shown("x" * MOST) == "x" * MOST


def texts(item: Any) -> list[str]:
    if isinstance(item, str):
        return [item]
    if isinstance(item, dict):
        return [text for key, value in item.items() for text in (*texts(key), *texts(value))]
    return [text for part in item for text in texts(part)] if isinstance(item, (list, tuple)) else []


def test_hostile_data_is_bounded_and_visible(hostile: Diff) -> None:
    found = texts(hostile.to_json())
    assert any("onload" in text for text in found) and any("\\x00" in text for text in found)
    assert max(map(len, found)) <= 2 * MOST + 8  # a title is two names
    assert not [c for text in found for c in set(text) if c != " " and unicodedata.category(c)[0] in "CZ"]


def test_hostile_page_is_the_same_page(hostile: Diff, demo: Diff) -> None:
    """Not one element or attribute more than in any page, and the data is the document."""
    found, usual = Page(hostile.html()), Page(demo.html())

    def tags(page: Page) -> list[Any]:
        return [tag for tag in page.tags if tag[0] != "meta"]

    assert tags(found) == tags(usual)
    assert dict(found.held)["module"] == dict(usual.held)["module"]
    assert json.loads(dict(found.held)["application/json"]) == json.loads(json.dumps(hostile.to_json()))
    assert not set(dict(found.held)["application/json"]) & {"<", ">", "&", "\u2028", "\u2029"}
    assert len(hostile.html()) < len(demo.html()) + 200_000


def test_the_page_test_sees_what_is_not_escaped(hostile: Diff, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the escapes taken away, the same hostile model does get elements into the page."""
    monkeypatch.setattr("fuser.diff.html.ESCAPES", {})
    broken = Page(Diff(hostile.document).html())
    assert [tag for tag, _ in broken.tags].count("script") > 2


def test_hostile_drawing_has_no_elements_of_its_own(hostile: Diff) -> None:
    elements = drawn(hostile.svg())
    assert any("onload" in (element.text or "") for element in elements)


def test_hostile_text_is_printable(hostile: Diff) -> None:
    lines = hostile.text().split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(hostile.text()) < 200_000


# The size and the time of a large one.


def test_thirty_two_layers() -> None:
    path = zoo.exported("llama", "torchscript", layers=32)
    fused = fuser.fuse(path, verify=False)
    assert fused.report.nodes_before > 6_500
    start = time.process_time()
    page = fused.diff().html()
    seconds = time.process_time() - start
    print(f"\n{len(page) / 1e6:.2f} MB of HTML in {seconds:.2f} s")
    assert len(page.encode()) < 3_000_000
    assert seconds < 6  # about one on a machine that is not shared


# The commands.


def fuse(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(code: int, *arguments: Any) -> str:
    """Asserts that the command fails with `code` and one line on stderr."""
    result = fuse(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == "" and result.stderr.startswith("fuse: ") and result.stderr.count("\n") == 1
    assert "internal error" not in result.stderr
    return result.stderr


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    model = models.decoder(3)
    onnx.save(model, tmp_path / "a.onnx")
    onnx.save(edited(model, 1)[0], tmp_path / "b.onnx")
    return tmp_path / "a.onnx", tmp_path / "b.onnx"


def test_diff_of_two_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = fuse("diff", *pair)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout == comparison.of_files(*pair).text() + "\n" and "com.microsoft.Gelu" in result.stdout
    starts = {"html": "<!doctype html>", "svg": "<svg ", "txt": "a.onnx -> b.onnx", "json": "{"}
    for ending, start in starts.items():
        assert fuse("diff", *pair, "-o", tmp_path / f"d.{ending}").output == ""
        assert (tmp_path / f"d.{ending}").read_text().startswith(start)
    assert json.loads(fuse("diff", *pair, "--format", "json").stdout)["version"] == 1
    fuse("diff", *pair, "-o", tmp_path / "page", "--format", "html")
    assert (tmp_path / "page").read_text() == (tmp_path / "d.html").read_text()


def test_fuse_writes_its_diff(tmp_path: Path) -> None:
    onnx.save(models.decoder(2), tmp_path / "m.onnx")
    result = fuse(tmp_path / "m.onnx", "-o", tmp_path / "out.onnx", "--diff", tmp_path / "d.json")
    assert result.exit_code == 0 and f"wrote {tmp_path / 'd.json'}" in result.stderr
    document = json.loads((tmp_path / "d.json").read_text())
    assert {"attention", "gated_mlp"} <= {pattern["name"] for pattern in document["patterns"]}
    diff = fuser.fuse(tmp_path / "m.onnx").diff()
    diff.save(tmp_path / "e.svg")
    assert (tmp_path / "e.svg").read_text() == diff.svg()
    # Without what was expected, nothing is written.
    assert fuse(tmp_path / "m.onnx", "--diff", tmp_path / "no.html", "--expect", "attention=9").exit_code == 5
    assert not (tmp_path / "no.html").exists()


def test_what_is_wrong_with_the_call(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    assert "ends in no form" in refused(2, "diff", a, b, "-o", tmp_path / "d.pdf")
    assert "formats are html" in refused(2, "diff", a, b, "--format", "pdf")
    assert "is the input" in refused(2, "diff", a, b, "-o", b, "--format", "html")
    assert "not a folder" in refused(2, "diff", a, b, "-o", tmp_path / "none" / "d.html")
    assert "is a directory" in refused(2, "diff", a, b, "-o", tmp_path, "--format", "html")
    assert "same file" in refused(2, a, "-o", tmp_path / "x.html", "--diff", tmp_path / "x.html")
    assert "ends in no form" in refused(2, a, "--diff", tmp_path / "x.png")
    assert fuse("diff", a).exit_code == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_what_is_no_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = pair
    (tmp_path / "text.onnx").write_text("no model")
    refused(3, "diff", a, tmp_path / "missing.onnx")
    refused(3, "diff", tmp_path / "text.onnx", a)
    refused(3, "diff", a, tmp_path)
    data = a.read_bytes()
    for place in range(0, len(data), len(data) // 12):
        (tmp_path / "cut.onnx").write_bytes(data[:place])
        result = fuse("diff", a, tmp_path / "cut.onnx", "-o", tmp_path / "d.html")
        assert result.exit_code in (0, 3) and "internal" not in result.output
        assert (tmp_path / "d.html").exists() == (result.exit_code == 0)
        (tmp_path / "d.html").unlink(missing_ok=True)


def test_files_that_do_not_fit_together_are_shown(tmp_path: Path) -> None:
    """What no runtime would take: a product whose sizes differ, an operator that nobody knows."""
    model = models.decoder(2)
    onnx.save(model, tmp_path / "a.onnx")
    model.graph.initializer[0].dims[:] = [len(model.graph.initializer[0].raw_data) // 4, 1]
    model.graph.node[3].op_type, model.graph.node[3].domain = "Unknown", "nobody"
    onnx.save(model, tmp_path / "b.onnx")
    document = comparison.of_files(tmp_path / "a.onnx", tmp_path / "b.onnx").document
    assert "nobody.Unknown" in {item.op for item in document.after.nodes}


def test_a_failed_write_leaves_what_was_there(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.html").write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(exporter.os, "replace", full)
    assert "the disk is full" in refused(1, "diff", *pair, "-o", tmp_path / "d.html")
    assert (tmp_path / "d.html").read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "d.html"]


def test_the_json_is_what_its_page_says(demo: Diff) -> None:
    page = (Path(__file__).parent.parent / "docs" / "diff.md").read_text()
    document = demo.to_json()

    def keys(item: Any) -> set[str]:
        if isinstance(item, dict):
            return {key for key, value in item.items() for key in (key, *keys(value))}
        return {key for part in item for key in keys(part)} if isinstance(item, (list, tuple)) else set()

    assert keys(document) <= set(re.findall(r"`(\w+)`", page))
    assert document == fuser.fuse(DEMO, verify=False).diff().to_json()
