"""GPUs as datasheets state them: memory, bandwidth, arithmetic, and the link to other cards."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from fuser.errors import InputError, UsageError

GB = 1 << 30  # of memory, as it is sold


@dataclass(frozen=True)
class Measured:
    """What a card was found to do; units as in `gpus.toml`.

    Attributes:
        read_gb_s, copy_gb_s: reading alone, and copying (bytes read and written).
        tflops, int8_tops, fp8_tflops: large products of 16 bits, int8, E4M3.
        launch_us: what a kernel takes that has next to nothing to do, one after another in a CUDA graph.
        int4_codes, nf4_codes, int8_codes: 1e12 weights a second that products of one token undo.
        int8_cache_gb_s: attention over int8 pages.
    """

    read_gb_s: float
    copy_gb_s: float
    tflops: float
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    launch_us: float = 2.0
    int4_codes: float | None = None
    nf4_codes: float | None = None
    int8_codes: float | None = None
    int8_cache_gb_s: float | None = None


@dataclass(frozen=True)
class GPU:
    """A card; units as in `gpus.toml`, sources there.

    Attributes:
        memory_gb: of 2^30 bytes.
        bandwidth_gb_s: of memory, 1e9 bytes a second.
        tflops: dense products of 16 bits with sums in float32, 1e12 a second; `int8_tops` and `fp8_tflops` of eight.
        link: what joins cards; link_gb_s: its rate, both directions together.
        measured: what one was found to do.
    """

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    tflops: float
    link: str = "PCIe"
    link_gb_s: float = 64
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    measured: Measured | None = None

    def rate(self, kind: str | None) -> float:
        """1e12 operations a second of products of `int8`, `fp8` or 16 bits, those that it lacks at 16 bits."""
        return {"int8": self.int8_tops, "fp8": self.fp8_tflops}.get(kind or "") or self.tflops


def known(extra: Path | None = None) -> dict[str, GPU]:
    """The GPUs that are known, by name; those of a file come before those of the package.

    Raises:
        InputError: the file is not as it must be.
    """
    found = _read(files("fuser.cost").joinpath("gpus.toml").read_text(encoding="utf-8"), "gpus.toml")
    return found | (_read(text_of(extra), str(extra)) if extra is not None else {})


def chosen(names: str | Iterable[str], among: Mapping[str, GPU] | None = None) -> list[GPU]:
    """GPUs by name, upper or lower case; `all` are all.

    Raises:
        UsageError: one is not known.
    """
    among = known() if among is None else among
    wanted = names.split(",") if isinstance(names, str) else list(names)
    by_name = {name.lower(): gpu for name, gpu in among.items()}
    found: list[GPU] = []
    for name in (name.strip() for name in wanted):
        if name.lower() not in by_name and name != "all":
            raise UsageError(f"no GPU '{name}' is known; known are {', '.join(among)}, and --gpus FILE adds others")
        found += among.values() if name == "all" else [by_name[name.lower()]]
    return found


def card_of(device: str) -> GPU | None:
    """The GPU that a device says it is, by all parts of its name: `NVIDIA A100-SXM4-80GB` is A100-80G."""
    words = device.replace("-", " ").split()
    for name, gpu in known().items():
        if all(part in words or f"{part}B" in words for part in name.split("-")):
            return gpu
    return None


def text_of(path: Path) -> str:
    """What a file holds.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read: {error}") from None


def tables(text: str, where: str) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file.

    Raises:
        InputError: it is not TOML, or has something beside tables.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"'{where}' is not TOML: {error}") from None
    if wrong := [name for name, table in found.items() if not isinstance(table, dict)]:
        raise InputError(f"'{where}': {wrong[0]} is no table; write [NAME] above what it has")
    return found


def _read(text: str, where: str) -> dict[str, GPU]:
    found = {}
    for name, table in tables(text, where).items():
        measured = table.pop("measured", None)
        made = _made(Measured, measured, f"'{where}': [{name}.measured]") if measured is not None else None
        found[name] = _made(GPU, {"name": name, "measured": made, **table}, f"'{where}': [{name}]")
    return found


def _made(kind: Any, table: Any, where: str) -> Any:
    """A dataclass of a table, whose numbers are positive."""
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table")
    allowed = {field.name for field in fields(kind)}
    if unknown := sorted(table.keys() - allowed):
        raise InputError(
            f"{where} has {', '.join(unknown)}, which says nothing; known are {', '.join(sorted(allowed))}"
        )
    for name, value in table.items():
        if name in ("name", "link", "measured"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise InputError(f"{where}: {name} must be a number above 0, got {value!r}")
    try:
        return kind(**table)
    except TypeError as error:
        raise InputError(f"{where}: {str(error).removeprefix('GPU.__init__() ')}") from None
