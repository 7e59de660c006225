"""Emitted folders: readable, whole, the same for the same model, and their own tests pass, and fail on a wrong kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fuser.cli import app
from fuser.codegen import attention, elementwise, embedding, linear, matmul, rotary
from fuser.codegen.compose import compose
from fuser.codegen.emit import INDEX, emit, files, moved_bytes, operations
from fuser.codegen.kernel import Kernel
from fuser.codegen.stubs import stub
from fuser.errors import OutputError, UsageError
from tests.test_stepper import DEMO, fused

SPAN = attention.Attention(6, 2, 32, 0.2, 8, window=20, dtype="fp32", sinks=True)
CAPPED = attention.Attention(4, 4, 32, 0.2, 16, softcap=9.0, alibi=True, dtype="fp32")
HEADS = rotary.Rotary(2, 1, 32, 16, 4, interleaved=True, dtype="fp32")
BY_TABLE = rotary.Rotary(2, 1, 32, 16, 4, by_block_table=True)
TILES = matmul.Tiles(32, 32, 32)
X = ("input", 0)


def described() -> dict[str, tuple[Kernel, object]]:
    """Every family with the parts that no emitted model here has."""
    products = {
        "gelu": linear.Linear(
            48, 40, 2, "fp32", norm="layer", norm_eps=1e-3, bias=True, activation="gelu", gated=False
        ),
        "split": linear.Linear(48, 128, 3, "fp32", residual=True),
        "heads": linear.Linear(128, 64, 1, "fp32", norm="rms", norm_eps=1e-6, rotary=HEADS, head_norm_eps=1e-5),
        "write": linear.Linear(128, 64, 2, "bf16", rotary=rotary.Rotary(2, 1, 32, 0, 4)),
        "gate": linear.Linear(128, 64, 4, norm="rms", norm_eps=1e-5, activation="silu", by_input=True),
    }
    tilings = {"split": linear.Tiling(16, 32, 2), "heads": linear.Tiling(16, 32, 2)}
    steps = (elementwise.Computed("Mul", (X, -2.0)), elementwise.Computed("silu", (("step", 0),)))
    chain = elementwise.Elementwise(33, (elementwise.Row(),), steps, (0, 1), dtype="fp16")
    table = embedding.Embedding(40, (11, 7), 3.0)
    norms = elementwise.norm("layer", 90, eps=1e-3, skip=True, bias=True)
    gated, added = matmul.Matmul(64, 50, activation="silu", gated=True), matmul.Matmul(50, 64, bias=True, residual=True)
    found: dict[str, tuple[Kernel, object]] = {
        f"linear_{name}": (linear.linear(what, tilings.get(name)), what) for name, what in products.items()
    }
    return found | {
        "decode": (attention.decode(SPAN, splits=3), SPAN),
        "prefill": (attention.prefill(SPAN, BLOCK_M=16), SPAN),
        "decode_capped": (attention.decode(CAPPED), CAPPED),
        "prefill_capped": (attention.prefill(CAPPED, BLOCK_M=16), CAPPED),
        "rotary": (rotary.rotary_cache_write(HEADS), HEADS),
        "rotary_by_table": (rotary.rotary_cache_write(BY_TABLE), BY_TABLE),
        "matmul_gated": (matmul.matmul(gated, TILES), gated),
        "matmul_added": (matmul.matmul(added, TILES), added),
        "norms": (elementwise.elementwise(norms), norms),
        "chain": (elementwise.elementwise(chain), chain),
        "embedding": (embedding.embedding(table), table),
    }


def run(test: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(test)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", described())
def test_a_stub_passes_and_can_fail(name: str, tmp_path: Path) -> None:
    kernel, what = described()[name]
    text = stub("it", kernel, what)
    assert text is not None
    (tmp_path / "test_it.py").write_text(text)
    (tmp_path / "it.py").write_text(kernel.text)
    passed = run(tmp_path / "test_it.py")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    wrong, count = re.subn(r"(tl\.store\((?:y|turned).*?, )(\w+)((?:, mask=.*)?\)\n)", r"\1\2 * 0.5\3", kernel.text)
    assert count  # what is stored in the result is halved
    (tmp_path / "it.py").write_text(wrong)
    failed = run(tmp_path / "test_it.py")
    assert failed.returncode and "AssertionError" in failed.stderr, failed.stderr


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("decode", "before != SPLITS - 1", "before != SPLITS - 2"),  # counters are not left as they were found
        ("decode", "(context - 1) - WINDOW", "context - WINDOW"),
        ("prefill", "- WINDOW)", "- WINDOW + 1)"),
        ("prefill", "tl.load(query_starts + sequence)", "0"),
        ("linear_heads", "tl.store(v_cache + slot *", "tl.store(v_cache + 0 * slot *"),
        ("linear_split", "for part in tl.static_range(2)", "for part in tl.static_range(1)"),
        ("linear_write", "other=-1", "other=0"),
        ("rotary_by_table", "position % PAGE", "0"),
        ("matmul_added", "bias + inside", "bias + 0 * inside"),
        ("norms", "+ 0.001", "+ 1.0"),
    ],
)
def test_a_stub_sees_what_a_kernel_does_wrong(name: str, right: str, wrong: str, tmp_path: Path) -> None:
    kernel, what = described()[name]
    assert right in kernel.text
    (tmp_path / "test_it.py").write_text(stub("it", kernel, what) or "")
    (tmp_path / "it.py").write_text(kernel.text.replace(right, wrong))
    failed = run(tmp_path / "test_it.py")
    assert failed.returncode and "AssertionError" in failed.stderr, failed.stderr


def test_stubs_are_formatted_and_clean(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    for name, (kernel, what) in described().items():
        (tmp_path / f"{name}.py").write_text(kernel.text)
        (tmp_path / f"test_{name}.py").write_text(stub(name, kernel, what) or "")
    for command in (["format", "--check"], ["check", "--select", "E,F,I,B"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length=120", str(tmp_path)]
        found = subprocess.run(ruff, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_the_command_writes_kernels_whose_tests_pass(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    result = CliRunner().invoke(app, [str(DEMO), "--emit-triton", str(folder), "--dtype", "fp32", "--tokens", "2"])
    assert result.exit_code == 0, result.output
    tests = sorted(folder.glob("test_*.py"))
    assert len(tests) >= 12
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and f"{len(tests)} passed" in ran.stdout, ran.stdout + ran.stderr
    index = (folder / INDEX).read_text()
    assert "*5 times:*" in index and "`model.layers.0.self_attn`" in index and "linear_1.py" in index
    pytest.importorskip("ruff")
    formatted = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=120", "--check", str(folder)]
    checked = subprocess.run(formatted, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "phi"])
def test_every_kernel_has_a_test_and_a_line(name: str) -> None:
    programs = [compose(fused(name), dtype="bf16", tokens=1), compose(fused(name), dtype="bf16", tokens=100)]
    made = files(programs, context=512)
    kernels = [file for file in made if file.endswith(".py") and not file.startswith("test_")]
    assert all(f"test_{kernel}" in made and kernel in made[INDEX] for kernel in kernels)
    assert made == files(programs, context=512)  # the same model, the same bytes
    words = {word for value in fused(name).inputs for word in value.name.split(".") if len(word) > 8}
    for kernel in kernels:  # no text of the model
        assert not words & set(made[kernel].replace("(", " ").split())


def test_amounts_of_attention() -> None:
    """Of a prompt each token sees those before it; a window bounds what is seen, and what is read."""
    steps = compose(fused("llama"), dtype="bf16", tokens=1).steps
    attend = next(step.what for step in steps if step.kernel is not None and step.kernel.name == "paged_decode")
    of_key, size = 4 * attend.heads * attend.head_dim, 2 * 2 * attend.kv_heads * attend.head_dim
    queries = 2 * 2 * attend.heads * attend.head_dim
    for tokens, decode, context, seen, read in (
        (3, True, 100, 300, 300),
        (100, False, 10, 5050, 100),
        (2, False, 100, 199, 100),
    ):
        program = compose(fused("llama"), dtype="bf16", tokens=tokens, decode=decode)
        step = next(step for step in program.steps if step.what == attend)
        assert operations(step, program, context) == of_key * seen
        assert moved_bytes(step, program, context) == size * read + queries * tokens


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    program = compose(fused("llama"), dtype="bf16", tokens=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("kept")
    with pytest.raises(UsageError, match="holds other files"):
        emit(tmp_path / "mine", [program], context=8)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes"]
    with pytest.raises(UsageError, match="is not a folder"):
        emit(tmp_path / "no/where", [program], context=8)
    emit(tmp_path / "new", [program], context=8)
    (tmp_path / "new/__pycache__").mkdir()  # of its tests
    before = {file.name for file in (tmp_path / "new").glob("*.*")}
    other = compose(fused("llama"), dtype="fp16", tokens=2)
    emit(tmp_path / "new", [other], context=8)  # an earlier emission is replaced
    assert {file.name for file in (tmp_path / "new").iterdir()} == {*files([other], context=8)} <= before
    (tmp_path / "new/notes.py").write_text("kept")
    with pytest.raises(UsageError, match="holds other files, 'notes.py'"):
        emit(tmp_path / "new", [program], context=8)
    assert (tmp_path / "new/notes.py").read_text() == "kept"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "new"]


def test_an_earlier_emission_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, folder = compose(fused("llama"), dtype="bf16", tokens=1), tmp_path / "kernels"
    emit(folder, [program], context=8)
    before = {file.name: file.read_text() for file in folder.iterdir()}
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "made":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="No space left"):
        emit(folder, [program], context=16)
    assert {file.name: file.read_text() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_emitted_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.api.fuse", lambda *_, **__: pytest.fail("work was done"))
    for option in (["--dtype", "fp8"], ["--tokens", "65"]):
        assert CliRunner().invoke(app, [str(DEMO), "--emit-triton", str(tmp_path / "k"), *option]).exit_code == 2
    assert CliRunner().invoke(app, [str(DEMO), "--emit-triton", str(DEMO.parent)]).exit_code == 2


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(DEMO), "--no-verify", "--emit-triton", str(tmp_path / "k"), "--dtype", "fp8"])
    assert result.exit_code == 2 and "not fp8" in result.output and not (tmp_path / "k").exists()
