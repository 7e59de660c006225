"""The examples of README.md, docs/python.md, docs/generation.md and docs/quantization.md, run as they stand there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _blocks(page: Path) -> str:
    """All the Python of a page, each line where it stands in it."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/generation.md", "docs/quantization.md"])
def test_examples(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")  # what they write stays out of the repository
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    source = _blocks(ROOT / page)
    assert "fuser" in source
    exec(compile(source, str(ROOT / page), "exec"), {"__name__": "example"})
    assert (tmp_path / "fused.onnx").is_file() or ".save(" not in source


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")))
def test_pages_are_linked(page: str) -> None:
    """Every page can be reached from the README, and links lead somewhere."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    links = {
        (path.parent / target).resolve()
        for path, text in texts.items()
        for target in re.findall(r"\]\(([^)#:]+)\)", text)
    }
    assert (ROOT / page).resolve() in links
    assert all(link.exists() for link in links)
