"""Emitted kernels as text: written line by line, kept in a cache folder by what they hold, and imported from there."""

import hashlib
import importlib.util
import os
import sys
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType

from fuser.errors import OutputError


class Source:
    """Lines of Python, indented by `with source.block("for ...:")`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    def __call__(self, *lines: str) -> None:
        """Adds lines at the present depth; an empty one stays empty."""
        self.lines += [f"{'    ' * self._depth}{line}" if line else "" for line in lines]

    def block(self, head: str) -> "Source":
        """A line that ends in a colon; what is added within is indented."""
        self(head)
        return self

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1

    def docstring(self, summary: str, *paragraphs: str) -> None:
        """A docstring, its paragraphs wrapped."""
        width = 116 - 4 * self._depth
        rest = [textwrap.wrap(text, width) for text in paragraphs if text]
        if not rest:
            self(f'"""{summary}"""')
            return
        self(f'"""{summary}')
        for lines in rest:
            self("", *lines)
        self('"""')

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def cache_folder() -> Path:
    """Where emitted kernels are kept: $FUSER_CACHE, else the user's cache folder."""
    given = os.environ.get("FUSER_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuser"


def load(text: str) -> ModuleType:
    """The module of an emitted text, from a file of the cache folder: Triton reads a kernel's source from its file.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    name = f"fuser_kernel_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    if name in sys.modules:
        return sys.modules[name]
    path = cache_folder() / "kernels" / f"{name}.py"
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, path)  # whole or not at all, whoever else writes it
    except OSError as error:
        raise OutputError(
            f"the kernel cache '{path.parent}' cannot be written: {error.strerror}; set FUSER_CACHE"
        ) from None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
