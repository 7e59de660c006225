"""The command: `fuse model.onnx -o fused.onnx`, and those beside it: `fuse explain model.onnx`."""

from fuser.cli import (
    costing,
    fusing,
    kernels,
    running,
)  # each registers its commands, in the order in which help lists them
from fuser.cli.console import Progress, app

__all__ = ["Progress", "app", "costing", "fusing", "kernels", "main", "running"]


def main() -> None:
    """The console entry point."""
    app()
