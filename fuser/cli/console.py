"""What all commands share: where they are registered, their options, their progress, and how they fail."""

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from fuser.errors import FuserError, UsageError

QUIET_SECONDS = 2.0

DEFAULT = "fuse"


class Commands(TyperGroup):
    """Commands by name, and without a name the default one: a file called like a command is `./explain`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        name = args[0] if args and args[0] in self.commands and args[0] != DEFAULT else ""
        if name:
            return self.commands[name].make_context(f"{info_name} {name}", args[1:], parent, **extra)
        return self.commands[DEFAULT].make_context(info_name, args, parent, obj=self, **extra)

    def invoke(self, ctx: Any) -> Any:
        return ctx.command.invoke(ctx)


class DefaultCommand(TyperCommand):
    """The default command, whose help lists the others."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        others = [command for name, command in ctx.obj.commands.items() if name != DEFAULT]
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.get_short_help_str(formatter.width)) for command in others])
        super().format_epilog(ctx, formatter)


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
HELP = {"help_option_names": ["-h", "--help"]}


class Progress:
    """Names the running stage on stderr once it has lasted two seconds."""

    def __init__(self, console: Console, enabled: bool) -> None:
        self.console, self.enabled = console, enabled
        self.timer: threading.Timer | None = None
        self.status: Any = None
        self.stage = ""

    def __call__(self, stage: str) -> None:
        """A stage begins; one whose first word is that of the running stage goes on with it: `quantize layers.0.mlp`."""
        goes_on = self.timer is not None and stage.split()[:1] == self.stage.split()[:1]
        self.stage = stage
        if goes_on:
            if self.status is not None:
                self.status.update(line(f"{stage} ..."))
            return
        self.stop()
        if self.enabled:
            self.timer = threading.Timer(QUIET_SECONDS, self._show)
            self.timer.daemon = True
            self.timer.start()

    def _show(self) -> None:
        text = line(f"{self.stage} ...")
        if self.console.is_terminal:
            self.status = self.console.status(text)
            self.status.start()
        else:
            self.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.status is not None:
            self.status.stop()
        self.timer = self.status = None


Model = Annotated[Path, typer.Argument(help="The ONNX file.", show_default=False)]
Dims = Annotated[list[str] | None, typer.Option(metavar="NAME=N", help="Fix a named dim of the inputs.")]
KvCache = Annotated[
    str, typer.Option(help="Element type of keys and values: auto (that of dtype), int8, or int8:GROUP (32, 64, 128).")
]
Weights = Annotated[
    str | None, typer.Option("--quantize", help="Quantize weights: int8, int4, int4:64, nf4, w8a8, fp8, ...")
]
Clip = Annotated[bool, typer.Option("--clip", help="Quantize with scales that make each group's squared error least.")]
Calibrate = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Quantize by a method that computes the model on this text; UTF-8.")
]
Method = Annotated[str, typer.Option(help="Of --calibrate: gptq or awq.")]
CalibrationTokens = Annotated[int, typer.Option(min=1, help="Use so many tokens of it at most.")]
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A tokenizer's folder; by default the model's own.")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks of internal errors.")]


def sizes(entries: list[str], option: str) -> dict[str, int]:
    """NAME=N pairs."""
    found: dict[str, int] = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        if not name or not number.isdecimal():
            raise UsageError(f"{option} {entry}: expected NAME=N, N a whole number")
        name, size = name.strip(), int(number[:20])
        if found.setdefault(name, size) != size:
            raise UsageError(f"{option} {entry}: {name} is {found[name]} already")
    return found


def counts(text: str, option: str = "--tokens", most: int = 64) -> list[int]:
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part[:20]) <= most for part in found):
        raise UsageError(f"{option} {text}: expected whole numbers from 1 to {most}, with commas between")
    return [int(part) for part in found]


def line(text: str) -> str:
    """`text` on one line, whatever names a model brought into it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def lines(text: str) -> str:
    return "\n".join(map(line, text.split("\n")))


@contextmanager
def failing(*, quiet: bool, verbose: bool) -> Iterator[tuple[Console, Progress]]:
    """The console and the progress of a command; whatever is raised ends it with one line and its exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    progress = Progress(console, not quiet)
    try:
        yield console, progress
    except FuserError as error:
        progress.stop()
        console.print(line(f"fuse: {error}"), markup=False)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        progress.stop()
        console.print("fuse: interrupted; nothing was written")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # whoever read stdout has gone; typer ends quietly
    except Exception as error:
        progress.stop()
        if verbose:
            traceback.print_exc()
        text = str(error).splitlines()[0] if str(error) else ""
        console.print(
            line(f"fuse: internal error, {type(error).__name__}: {text} (-v shows where; please report it)"),
            markup=False,
        )
        raise typer.Exit(1) from None
    finally:
        progress.stop()
