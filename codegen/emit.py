"""The kernels of programs as files a person reads: one a kernel, a test beside each, and an index of the launches."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuser.codegen.attention import Attention
from fuser.codegen.kernel import DTYPES
from fuser.codegen.linear import Linear
from fuser.codegen.plan import amount, repeated
from fuser.codegen.program import Cached, Part, Program, Rows, Step, Weight
from fuser.codegen.stubs import stub
from fuser.errors import OutputError, UsageError

INDEX = "INDEX.md"
MARK = "# Kernels of a fused model"
LEFTOVERS = frozenset({"__pycache__", ".pytest_cache", ".ruff_cache"})  # of those who ran the tests


def emit(folder: str | os.PathLike[str], programs: Sequence[Program], *, context: int) -> None:
    """Writes the kernels of some programs to `folder`, whole or not at all; an earlier emission there is replaced.

    Args:
        context: keys of a sequence that the index counts bytes and operations for.

    Raises:
        UsageError: the folder holds something else.
        OutputError: it cannot be written; what stood there is untouched.
    """
    folder = Path(folder)
    check(folder)
    target = folder.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            made, before = Path(temporary, "made"), Path(temporary, "before")
            made.mkdir()
            for name, text in files(programs, context=context).items():
                (made / name).write_text(text, encoding="utf-8")
            if target.exists():
                target.rename(before)
            try:
                made.rename(target)
            except OSError:
                if before.exists():
                    before.rename(target)
                raise
    except OSError as error:
        raise OutputError(f"kernels cannot be written to '{folder}': {error.strerror or error}") from error


def check(folder: Path) -> None:
    """Refuses a folder that is neither new, nor empty, nor an earlier emission and nothing else, before any work is done.

    Raises:
        UsageError: it is.
    """
    try:
        if not folder.absolute().parent.is_dir():
            raise UsageError(f"'{folder.parent}' is not a folder")
        if not folder.exists() and not folder.is_symlink():
            return
        if not folder.is_dir():
            raise UsageError(f"'{folder}' is not a folder")
        held = {path.name for path in folder.iterdir()} - LEFTOVERS
        index = (folder / INDEX).read_text(encoding="utf-8", errors="replace") if INDEX in held else ""
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written to: {error.strerror}") from None
    names = re.findall(r"\]\((\w+)\.py\)", index) if index.startswith(MARK) else []
    others = held - {f"{start}{name}.py" for name in names for start in ("", "test_")} - ({INDEX} if names else set())
    if others:
        raise UsageError(
            f"'{folder}' holds other files, '{min(others)}'; give a new folder, or one of kernels that were written before"
        )


def files(programs: Sequence[Program], *, context: int) -> dict[str, str]:
    """What `emit` writes, by file name."""
    names: dict[str, str] = {}  # of kernels, by their text
    made: dict[str, str] = {}
    counts: dict[str, int] = {}
    for program in programs:
        for step in program.steps:
            if step.kernel is not None and step.kernel.text not in names:
                family = step.kernel.name
                counts[family] = counts.get(family, 0) + 1
                names[step.kernel.text] = name = f"{family}_{counts[family]}"
                made[f"{name}.py"] = step.kernel.text
                test = stub(name, step.kernel, step.what)
                if test is not None:
                    made[f"test_{name}.py"] = test
    made[INDEX] = _index(programs, names, context)
    return made


def _index(programs: Sequence[Program], names: dict[str, str], context: int) -> str:
    lines = [
        MARK,
        "",
        "Every other file is a kernel, a Triton module with `kernel` and `launch`, or its test, which stands for itself:",
        "`python test_NAME.py` runs it beside what it computes, on a CUDA device or in Triton's interpreter.",
    ]
    for program in programs:
        kind = "a token of every sequence" if program.decode else "any tokens of any sequences"
        lines += [
            "",
            f"## {kind[0].upper()}{kind[1:]}, {program.tokens} at most, {program.dtype}",
            "",
            f"Bytes and operations of {_sizes(program, context)}; torch: no kernel of its own.",
            "",
            "| launch | kernel | moves | computes | grid | configuration | of |",
            "|---|---|---|---|---|---|---|",
        ]
        rows = [_row(step, program, names, context) for step in program.steps]
        number = 1
        for count, run in repeated(rows, [row[:-1] for row in rows]):
            if count > 1:
                lines.append(f"| | *{count} times:* | | | | | |")
            for row in run:
                lines.append(f"| {number} | {' | '.join(row)} |")
                number += 1
            number += (count - 1) * len(run)
    lines += ["", "## Kernels", "", "| kernel | computes |", "|---|---|"]
    lines += [f"| [{name}]({name}.py) | {_documentation(text)[0]} |" for text, name in names.items()]
    return "\n".join([*lines, ""])


def _sizes(program: Program, context: int) -> str:
    if program.decode:
        return (
            f"{program.tokens} sequences of {context} keys" if program.tokens > 1 else f"a sequence of {context} keys"
        )
    return f"{program.tokens} new tokens of a sequence of {_keys(program, context)} keys"


def _keys(program: Program, context: int) -> int:
    """The keys of a sequence, its new tokens included."""
    return max(context, 1 if program.decode else program.tokens)


def _documentation(text: str) -> list[str]:
    """The lines of a kernel's docstring."""
    return text.split('"""')[1].splitlines()


def _row(step: Step, program: Program, names: dict[str, str], context: int) -> tuple[str, ...]:
    if step.kernel is None:
        name = "torch: product" if step.kind == "product" else f"torch: {step.nodes[0].op}"
        chosen, grid = step.reason, ""
    else:
        name = f"[{names[step.kernel.text]}]({names[step.kernel.text]}.py)"
        shown = {k: v for k, v in step.kernel.constants.items() if k.startswith(("BLOCK", "SPLITS"))}
        chosen = ", ".join(f"{k} {v}" for k, v in (shown | dict(step.kernel.options)).items())
        lines = _documentation(step.kernel.text)
        stated = next((line.removeprefix("Grid: ") for line in lines if line.startswith("Grid: ")), "")
        grid = stated.partition(". ")[0].removesuffix(".")
    module = "".join(c if c.isalnum() or c in "._[]-" else "?" for c in step.origin.module)
    moved, done = moved_bytes(step, program, context), operations(step, program, context)
    return (
        name,
        f"{amount(moved)}B",
        f"{amount(done)}FLOP" if done else "",
        grid,
        chosen,
        f"`{module}`" if module else "",
    )


def moved_bytes(step: Step, program: Program, context: int) -> int:
    """Bytes that a step reads and writes at least, for all the program's tokens and `context` keys a sequence."""
    size, tokens = DTYPES[program.dtype], program.tokens
    sequences = tokens if program.decode else 1
    total = 0
    for argument in step.arguments:
        if isinstance(argument, (Rows, Part)):
            total += tokens * argument.width * size
        elif isinstance(argument, Cached):
            state = argument.state
            rows = tokens
            if isinstance(step.what, Attention):
                keys = _keys(program, context)
                rows = sequences * min(keys, (state.window or keys) + tokens // sequences - 1)
            total += rows * state.kv_heads * state.head_dim * size
        elif isinstance(argument, Weight) and argument.base is not None:
            if argument.kind == "table":
                total += tokens * (argument.base.size // argument.base.shape[0]) * size
            elif argument.kind == "linear":
                total += argument.base.size * size
    return total


def operations(step: Step, program: Program, context: int) -> int:
    """Floating-point operations of a step's products, a multiply-add as two."""
    what: Any = step.what
    if isinstance(what, Linear):
        return 2 * program.tokens * what.N * what.K
    if isinstance(what, Attention):
        keys = _keys(program, context)
        first = keys if program.decode else keys - program.tokens + 1  # that the first new token sees
        seen = sum(min(count, what.window or count) for count in range(first, keys + 1))
        return 4 * seen * (program.tokens if program.decode else 1) * what.heads * what.head_dim
    if step.kind == "product":
        weight = step.arguments[1]
        return 2 * program.tokens * weight.base.size if isinstance(weight, Weight) and weight.base is not None else 0
    return 0
