"""The command: `fuse model.onnx -o fused.onnx`, and those beside it: `fuse explain model.onnx`."""

from fuser.cli import fusing, diffing, costing, kernels, running  # noqa: I001  each registers its commands, in help's order
from fuser.cli.console import Progress, app

__all__ = ["Progress", "app", "costing", "diffing", "fusing", "kernels", "main", "running"]


def main() -> None:
    """The console entry point."""
    app()
