"""fuser: find the transformer in an exported graph, fuse it, prove every rewrite."""

from typing import TYPE_CHECKING, Any

from fuser.errors import (
    ExpectationError,
    FuserError,
    InputError,
    OutputError,
    UnsupportedOperator,
    UsageError,
    VerificationError,
)
from fuser.version import __version__

if TYPE_CHECKING:
    from fuser.api import FusedModel, fuse
    from fuser.compiling import compile
    from fuser.evaluating import evaluate
    from fuser.llm import LLM
    from fuser.loading import Model, load
    from fuser.quality import Quality
    from fuser.quantizing import quantize
    from fuser.report import Report
    from fuser.runtime.parameters import SamplingParams

__all__ = [
    "LLM",
    "ExpectationError",
    "FusedModel",
    "FuserError",
    "InputError",
    "Model",
    "OutputError",
    "Quality",
    "Report",
    "SamplingParams",
    "UnsupportedOperator",
    "UsageError",
    "VerificationError",
    "__version__",
    "compile",
    "evaluate",
    "fuse",
    "load",
    "quantize",
]

_LAZY = {
    "LLM": "fuser.llm",
    "SamplingParams": "fuser.runtime.parameters",
    "FusedModel": "fuser.api",
    "compile": "fuser.compiling",
    "evaluate": "fuser.evaluating",
    "fuse": "fuser.api",
    "Quality": "fuser.quality",
    "Report": "fuser.report",
    "Model": "fuser.loading",
    "load": "fuser.loading",
    "quantize": "fuser.quantizing",
}


def __getattr__(name: str) -> Any:
    """Loads the compiler on first use: `import fuser` alone costs nothing."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fuser' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
