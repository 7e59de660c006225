"""torch.export, with one typed error for each thing that goes wrong."""

import contextlib
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fuser.errors import InputError

TORCH = str(Path(torch.__file__).parent) + os.sep
OURS = str(Path(__file__).parents[1]) + os.sep
# Where torch.export logs what an error says again, and which sizes of an example are fixed.
LOGGERS = ("torch.export._trace", "torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")


def export_module(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Any = True
) -> ExportedProgram:
    """The program of a module, in the state that `eval()` gives, on example arguments.

    Args:
        dynamic: True: every size may differ from the example's where the module allows it; False: none; or what
            `torch.export.export` takes as `dynamic_shapes`.

    Raises:
        InputError: the arguments do not fit the module, or its control flow depends on what tensors hold. The text
            names the place in the module's own source.
    """
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(f"{type(module).__name__} cannot be captured: {error}") from None
    # Inputs that are one tensor, or a parameter, are inputs all the same.
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, dict(kwargs)))
    whole, shapes = module, dynamic
    if dynamic is True:
        if bound.keys() >= kwargs.keys():
            shapes = pytree.tree_map(_every_size, dict(bound))
        else:  # torch does not find the shapes of what **kwargs takes
            whole, args, kwargs = _Whole(module), (args, kwargs), {}
            shapes = dict(zip(("args", "kwargs"), pytree.tree_map(_every_size, args), strict=True))
    elif dynamic is False:
        shapes = None
    try:
        with evaluating(whole), _quiet():
            return torch.export.export(whole, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises some dozen types, and a module whatever it likes
        raise InputError(_explained(module, error, pytree.tree_leaves((args, kwargs)))) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export tells besides its errors, unless its logs were asked for; it prints whole graphs."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    loggers = [logger for logger in map(logging.getLogger, LOGGERS) if not logger.isEnabledFor(logging.INFO)]
    printed = io.StringIO()
    for logger in loggers:
        logger.addFilter(refuse)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
        sys.stderr.write(printed.getvalue())  # by the module itself
    finally:
        for logger in loggers:
            logger.removeFilter(refuse)


class _Whole(nn.Module):
    """A module as a function of all its arguments at once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.module(*args, **kwargs)


def _every_size(leaf: Any) -> Any:
    return dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, Tensor) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in the state that `eval()` gives, and afterwards in the one it was in."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _explained(module: nn.Module, error: Exception, given: Sequence[Any]) -> str:
    """What went wrong in one or two lines, and where in the module's source."""
    name = type(module).__name__
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if "data-dependent" in text or "DataDependent" in kind or "Dynamic control flow" in text:
        text = "its control flow depends on what a tensor holds"
    else:
        text = text[:200] + ("..." if len(text) > 200 else "")
    place = _place(error)
    tensors = [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in given if isinstance(x, Tensor)]
    on = f" on {', '.join(tensors[:4])}{', ...' if len(tensors) > 4 else ''}" if tensors else ""
    return f"{name} cannot be captured{on}: {text or kind}" + (f" (at {place})" if place else "")


def _place(error: Exception) -> str:
    """The innermost line of code that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((TORCH, OURS, "<"))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
