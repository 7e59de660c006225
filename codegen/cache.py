"""Where emitted kernels live: a user cache folder, one file a kernel named by the hash of its text, imported once."""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType

from fuser.codegen.kernel import Kernel
from fuser.errors import OutputError

_LOADED: dict[Path, ModuleType] = {}


def cache_folder() -> Path:
    """FUSER_CACHE_DIR, or `fuser` in the user's cache folder; kernels stand in `kernels` below it."""
    chosen = os.environ.get("FUSER_CACHE_DIR")
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuser"
    return root / "kernels"


def path_of(kernel: Kernel) -> Path:
    """The file of a kernel: the same text has the same name."""
    digest = hashlib.sha256(kernel.text.encode()).hexdigest()[:20]
    return cache_folder() / f"{kernel.name}_{digest}.py"


def write(kernel: Kernel) -> Path:
    """The kernel's file, written if it is not there. Other processes see it whole or not at all.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    path = path_of(kernel)
    try:
        if path.exists() and path.read_text() == kernel.text:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, kernel.text)
    except OSError as error:
        raise OutputError(f"codegen: kernel {kernel.name} cannot be written to {path}: {error}") from error
    return path


def replace(path: Path, text: str) -> None:
    """Writes a file of the cache: other processes see the one before, or all of this one. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(kernel: Kernel) -> ModuleType:
    """The kernel's module, with the functions `kernel` and `launch`.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    path = write(kernel)
    if path not in _LOADED:
        spec = importlib.util.spec_from_file_location(f"fuser_kernel_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _LOADED[path] = module
    return _LOADED[path]
