"""Operator tables: every node that runs is counted once for what it is for, and pages hold what tables say."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from fuser import api
from fuser.cli import app
from fuser.cost import drawing, launches, on_cpu
from fuser.cost.modules import Made, graph_of
from fuser.cost.profile import Measure, Profile, step_us, timed
from fuser.cost.workload import Shape
from fuser.errors import InputError, UsageError

DEMO = Path(__file__).parents[1] / "models" / "demo" / "model.onnx"
TINY = Shape("tiny", 64, 5, 4, 2, 16, 160, True, 128, False, "rms", False, "rotary")


@pytest.fixture(scope="module")
def demo() -> Profile:
    return on_cpu.profile(DEMO, batch=2, context=64)


def test_every_node_of_a_file_is_counted_once(demo: Profile, tmp_path: Path) -> None:
    fused = api.fuse(DEMO, verify=False)
    fused.save(tmp_path / "fused.onnx")
    for side, path in ((demo.before, DEMO), (demo.after, tmp_path / "fused.onnx")):
        nodes = onnx.load(str(path), load_external_data=False).graph.node
        assert sum(row.count * row.launches for row in side) == sum(node.op_type != "Constant" for node in nodes)
        assert all(row.us > 0 for row in side) and len({row.name for row in side}) == len(side)


def test_nodes_are_for_what_the_fused_nodes_are(demo: Profile) -> None:
    before, after = ({row.name: row for row in side} for side in (demo.before, demo.after))
    layer = {"qkv": 3, "o": 1, "feed-forward A": 2, "feed-forward B": 1}
    assert {name: before[name].launches for name in layer} == layer
    assert all(before[name].count == 5 for name in layer)
    assert after["feed-forward B"].launches == 1 and after["norm B"].launches < before["norm B"].launches
    assert before["rotary, cache write"].launches > 3
    # of 192 x 416, in float32; and what the products multiply
    assert before["feed-forward B"].flops == 2 * 2 * 192 * 416 and after["feed-forward B"].flops == 2 * 2 * 192 * 416
    assert before["feed-forward B"].bytes == 4 * (192 * 416 + 2 * (192 + 416))
    assert before["attention"].bytes > after["attention"].bytes  # scores and repeated heads are not written


def test_shares_and_ceilings(demo: Profile) -> None:
    told = demo.to_json()
    for side in ("before", "after"):
        assert sum(row["share"] for row in told[side]) == pytest.approx(1)
    row = Measure("x", 2, 10.0, 4e6, 1e9)
    assert row.gb_s == pytest.approx(400) and row.tflops == pytest.approx(100)
    profile = replace(demo, copy_gb_s=800.0, product_tflops=400.0)
    assert profile.share_of_ceiling(row) == 0.5
    assert step_us([row, row]) == 40


@cache
def _tiny() -> Made:
    return graph_of(TINY)


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_shape_by_its_launches(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that measures on a GPU, with reference kernels and another clock."""
    monkeypatch.setattr(launches, "graph_of", lambda shape, note: _tiny())
    found = launches.profile(TINY, batch=2, context=40, dtype="fp32", device="cpu", kv=kv)
    before, after = ({row.name: row for row in side} for side in (found.before, found.after))
    assert [before[name].count for name in ("q", "attention", "feed-forward B", "head")] == [5, 5, 5, 1]
    assert {"norm", "qkv", "rotary, cache write", "attention", "o, residual", "feed-forward A", "head"} <= after.keys()
    assert after["norm"].count == 2 * 5 + 1 and after["qkv"].count == 5 and after["head"].count == 1
    assert before["feed-forward B"].flops == after["feed-forward B, residual"].flops == 2 * 2 * 64 * 160
    cache = 2 * 40 * 2 * 2 * 16 * 4
    assert after["attention"].bytes < cache if kv == "int8" else after["attention"].bytes > cache
    assert found.predicted_us is None and found.step_us and found.step_us > 0
    assert "before fusion" in found.text()


def test_eager_operators_of_other_families() -> None:
    shape = replace(TINY, norm="layer", gated=False, positions="alibi", kv_heads=4)
    from torch import device, float32

    from fuser.cost.eager import operators

    found = list(operators(shape, 2, 8, float32, device("cpu"), 2))
    assert [op.name for op in found if op.name in ("rotary", "gate", "feed-forward A, gate")] == []
    for op in found:
        for call in op.calls:
            call()


def test_the_clock_tells_time() -> None:
    calls: list[int] = []
    assert timed(lambda i: calls.append(i), 3, repeats=2, least_s=1e-4) > 0
    assert set(calls) == {0, 1, 2}


def test_pages_hold_drawings_and_no_script(demo: Profile) -> None:
    hostile = replace(demo, model='<script>alert("x")</script>', after=[Measure("a<b&c", 1, 1.0, 1e3, 1e3)])
    page = drawing.page([demo, hostile])
    assert "<script" not in page and "http" not in page
    drawings = page.split("<svg")[1:]
    assert len(drawings) == 4
    for text in drawings:
        root = ElementTree.fromstring("<svg" + text.split("</svg>")[0] + "</svg>")
        assert len(root) > 5
    points = [one for one in (*demo.before, *demo.after) if one.flops > 0 and one.bytes > 0]
    assert drawing.roofline(demo).count("<circle") == len(points) + 2  # and the legend's


def test_command(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["profile", str(DEMO), "--batch", "1,2", "--context", "16", "--json", "--html", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["batch"] for one in found] == [1, 2] and found[0]["before_us"] > 0
    assert page.read_text(encoding="utf-8").count("<svg") == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-model"],
        ["7B", "--device", "cpu", "--dtype", "fp8"],
        [str(DEMO), "--quantize", "int4"],
        [str(DEMO), "--batch", "0"],
        [str(Path(__file__))],
        [str(DEMO), "--context", "16", "--html", "/no/such/folder/page.html"],
        [str(DEMO), "--context", "16", "--html", str(DEMO)],
    ],
)
def test_bad_calls_are_one_line(arguments: list[str]) -> None:
    held = DEMO.read_bytes()
    result = CliRunner().invoke(app, ["profile", *arguments])
    assert DEMO.read_bytes() == held
    assert result.exit_code in (1, 2, 3) and "Traceback" not in result.output and "internal" not in result.output


def test_files_that_do_not_run(tmp_path: Path) -> None:
    with pytest.raises((InputError, UsageError)):
        on_cpu.profile(tmp_path / "missing.onnx", batch=1)
