"""The repository's own rules: lint, types, import contracts, the wheel, and the README's commands."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("patterns", "codegen", "runtime", "models")
CODE = [
    path
    for folder in ("fuser", *FOLDERS, "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "/.venv/" not in str(path)
]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("importlinter.cli",),
    ],
    ids=lambda command: " ".join(command),
)
def test_static_checks(command: tuple[str, ...]) -> None:
    if command[0] == "importlinter.cli":
        program = "from importlinter.cli import lint_imports_command as main; main()"
        result = run(sys.executable, "-c", program, PYTHONPATH=str(ROOT))
    else:
        result = run(sys.executable, "-m", *command)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_names() -> None:
    """The folders stand at the top, but their import names are fuser.patterns and so on, everywhere."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in FOLDERS, f"{path}:{node.lineno} imports {name}; write fuser.{name}"


def test_folders_are_links_to_the_top() -> None:
    for name in FOLDERS:
        link = ROOT / "fuser" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_import_is_lazy() -> None:
    heavy = {
        "fuser": "torch triton transformers onnxruntime onnx sympy networkx",
        "fuser.api": "triton transformers onnxruntime",
    }
    for module, names in heavy.items():
        program = f"import sys, {module}; found = set('{names}'.split()) & set(sys.modules); assert not found, found"
        result = run(sys.executable, "-c", program)
        assert result.returncode == 0, result.stderr


def test_wheel(tmp_path: Path) -> None:
    """The wheel holds real files under one name, and its command runs."""
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), ".")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert (
            "fuser/py.typed" in names and "fuser/patterns/rms_norm.py" in names and "fuser/models/__init__.py" in names
        )
        assert not [name for name in names if name.startswith("fuser/models/demo/")]
        assert archive.read("fuser/patterns/rms_norm.py") == (ROOT / "patterns/rms_norm.py").read_bytes()
        tops = {name.split("/")[0] for name in names}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"fuser"}
    site = tmp_path / "site"
    installed = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel)
    )
    assert installed.returncode == 0, installed.stderr
    result = run(sys.executable, str(site / "bin" / "fuse"), "--version", cwd=tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0 and result.stdout.startswith("fuse 0."), result.stdout + result.stderr


def test_readme_commands_are_the_ones_ci_runs() -> None:
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```bash\n")[1:]
    commands = [line for block in blocks for line in block.split("```")[0].splitlines() if line.strip()]
    assert len(commands) == 2
    assert "fuse models/demo/model.onnx -o fused.onnx" in commands[0]
    assert "-m pytest -n auto" in commands[1]
    assert "README.md" in (ROOT / ".ci/run").read_text(encoding="utf-8")
