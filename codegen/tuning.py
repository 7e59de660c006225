"""Chosen configurations of kernels: what may be chosen, what was measured best on a GPU, and where that is kept.

A kernel's description and the bucket of its sizes are a key; a choice is the arguments that its family takes. Tables of
known GPUs ship with the package; a user's own results, in the cache folder, come before them.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fuser.codegen import cache, code_values, quantized
from fuser.codegen.attention import Attention, decode, default_splits, prefill
from fuser.codegen.elementwise import elementwise
from fuser.codegen.kernel import Kernel, power_of_two
from fuser.codegen.linear import Linear, Tiling, default_tiling, linear
from fuser.codegen.quantized import quantized_linear
from fuser.codegen.rotary import Rotary, rotary_cache_write
from fuser.errors import FuserError, OutputError

Choice = Mapping[str, int]
SHIPPED = Path(__file__).parent / "tables"
# Of decode: keys a step, warps, stages. Steps over int8 hold half the bytes, so more of them are on their way.
OF_FLOATS = ((16, 1, 8), (32, 1, 6), (16, 2, 8), (64, 2, 4), (32, 2, 5), (64, 4, 3), (64, 4, 5), (128, 4, 3))
OF_INT8 = (
    (32, 1, 6), (32, 1, 8), (32, 1, 4), (16, 1, 8), (16, 1, 12), (64, 1, 3), (64, 2, 4), (64, 4, 6), (64, 4, 4), (32, 2, 8),
    (32, 2, 5), (128, 4, 4), (128, 4, 6),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A kernel to choose for: its description, and the sizes that it leaves open.

    Of attention `sequences` and `tokens`, the keys of each, are given; `decode`: one query a sequence.
    """

    what: Any
    sequences: int = 1
    tokens: int = 0
    decode: bool = True

    @property
    def key(self) -> str:
        """What identifies it: the family, every field that is not the default, sizes in powers of two."""
        name = type(self.what).__name__.lower()
        if isinstance(self.what, Attention):
            name = "decode" if self.decode else "prefill"
        bucket = self.bucket
        open_sizes = f" x{bucket.sequences} T{bucket.tokens}" if self.tokens else ""
        return f"{name} {' '.join(_told(bucket.what))}{open_sizes}"

    @property
    def bucket(self) -> "Problem":
        """The problem that stands for all of its key: sizes in powers of two, few tokens as many as a tile takes."""
        what = self.what
        if isinstance(what, Linear) and what.tokens > 1:
            what = replace(what, tokens=max(power_of_two(what.tokens), 16))
        return replace(self, what=what, sequences=power_of_two(self.sequences), tokens=power_of_two(self.tokens))

    def kernel(self, choice: Choice | None = None) -> Kernel:
        """The kernel by a choice, or by the default one.

        Raises:
            FuserError: the choice does not fit.
        """
        given: dict[str, Any] = dict(choice or self.default)
        if isinstance(self.what, Linear):
            make = quantized_linear if self.what.format is not None and not self.what.rounds else linear
            return make(self.what, Tiling(**given))
        if isinstance(self.what, Attention):
            return decode(self.what, **given) if self.decode else prefill(self.what, **given)
        if isinstance(self.what, Rotary):
            return rotary_cache_write(self.what, **given)
        return elementwise(self.what, **given)

    def fits(self, choice: Choice) -> bool:
        """Whether there is a kernel by a choice."""
        try:
            self.kernel(choice)
        except FuserError:
            return False
        return True

    @property
    def default(self) -> Choice:
        """What is taken where nothing was measured."""
        if isinstance(self.what, Linear):
            is_codes = self.what.format is not None and not self.what.rounds
            default = quantized.default_tiling if is_codes else default_tiling
            return _arguments(default(self.what))
        if isinstance(self.what, Attention) and self.decode:
            return {"splits": default_splits(self.what, self.sequences, self.tokens)}
        return {}

    def candidates(self, known: Choice | None = None) -> Iterator[Choice]:
        """What may be chosen for the bucket, its default first and then what is known to be good, each once."""
        seen: list[Choice] = []
        for choice in (self.bucket.default, *([known] if known is not None else []), *self.bucket._others()):
            if choice not in seen:
                seen.append(choice)
                yield choice

    def _others(self) -> Iterator[Choice]:
        if isinstance(self.what, Linear):
            yield from map(_arguments, _tilings(self.what))
        elif isinstance(self.what, Attention):
            yield from self._of_decode(self.what) if self.decode else _of_prefill(self.what)
        elif isinstance(self.what, Rotary):
            for heads, warps in ((1, 1), (2, 1), (4, 2), (8, 4), (16, 4)):
                yield {"BLOCK_H": heads, "num_warps": warps}
        else:
            for warps in (1, 2, 4, 8, 16):
                yield {"num_warps": warps}

    def _of_decode(self, what: Attention) -> Iterator[Choice]:
        groups = self.sequences * what.kv_heads
        keys = min(self.tokens, what.window or self.tokens)
        for BLOCK_T, warps, stages in OF_INT8 if what.kv_group else OF_FLOATS:
            counts = {max(1, min(programs // groups, -(-keys // BLOCK_T))) for programs in (132, 264, 396, 528, 1056)}
            for splits in sorted(counts | {1} if groups >= 128 else counts):
                yield {"splits": splits, "BLOCK_T": BLOCK_T, "num_warps": warps, "num_stages": stages}


def _told(what: Any) -> Iterator[str]:
    """The fields of a description that are not the default, as name=value."""
    for place in fields(what):
        value = getattr(what, place.name)
        if value == place.default:
            continue
        if hasattr(value, "__dataclass_fields__"):
            yield f"{place.name}({' '.join(_told(value))})"
        elif isinstance(value, tuple):
            yield f"{place.name}={'+'.join(_item(item) for item in value)}"
        elif not (isinstance(value, float) and place.name.endswith(("eps", "scale"))):  # numbers that cost nothing
            yield f"{place.name}={value}"


def _item(item: Any) -> str:
    return str(getattr(item, "activation", "") or getattr(item, "op", "") or type(item).__name__.lower())


def _arguments(tiling: Tiling) -> Choice:
    return {place.name: getattr(tiling, place.name) for place in fields(tiling)}


def _tilings_of_codes(what: Linear, whole_head: int) -> Iterator[Tiling]:
    assert what.format is not None
    C = code_values.columns(what.format)
    steps = -(-what.K // C)
    sides = 2 if what.pairs or what.rotary is not None else 1
    for rows, warps in ((64, 4), (128, 8), (128, 4)):
        BLOCK_N = rows // sides
        if whole_head not in (0, BLOCK_N):
            continue
        for held in (2, 4, 1) if what.tokens <= 16 else ():
            yield Tiling(BLOCK_N, C, -(-steps // held), warps, 1)
        for splits in (4, 2, 3, 1, 6):
            for stages in (4, 3, 6):
                if splits <= max(steps // 4, 1):
                    yield Tiling(BLOCK_N, C, splits, warps, stages)


def _tilings_of_eight_bits(whole_head: int) -> Iterator[Tiling]:
    for rows, warps in ((64, 4), (128, 4), (128, 8)):
        for columns, stages in ((128, 4), (128, 6), (256, 3), (256, 4)):
            for splits in (1, 2, 4):
                if not whole_head or rows == whole_head:
                    yield Tiling(rows, columns, splits, warps, stages)


def _tilings(what: Linear) -> Iterator[Tiling]:
    whole_head = what.rotary.head_dim // 2 if what.rotary is not None and what.head_norm_eps is not None else 0
    if what.format is not None:
        yield from _tilings_of_eight_bits(whole_head) if what.rounds else _tilings_of_codes(what, whole_head)
        return
    if what.tokens == 1 and not whole_head:
        for rows in (1, 2, 4):
            for columns, warps in (
                (512, 1),
                (1024, 2),
                (1024, 4),
                (2048, 1),
                (2048, 4),
                (2048, 8),
                (4096, 4),
                (4096, 8),
            ):
                if rows * columns <= 8192:
                    yield Tiling(rows, columns, 1, warps, 1)
        return
    if what.tokens == 1:
        for columns, parts, warps in ((64, 8, 4), (64, 4, 4), (128, 8, 8), (32, 8, 4), (64, 16, 4)):
            yield Tiling(whole_head, columns, parts, warps, 1)
        return
    for rows, columns, parts, warps, stages in (
        (64, 128, 1, 4, 4), (64, 128, 2, 4, 4), (64, 64, 1, 4, 6), (64, 64, 2, 4, 6), (64, 64, 1, 4, 8), (64, 128, 4, 4, 4),
        (16, 128, 1, 2, 6), (16, 256, 1, 4, 4), (32, 128, 1, 4, 4), (32, 128, 2, 4, 4), (32, 256, 2, 4, 3),
        (64, 256, 1, 8, 3), (64, 256, 2, 8, 3), (128, 64, 1, 4, 5), (128, 64, 2, 4, 5), (128, 128, 2, 8, 3), (64, 128, 3, 4, 4),
        (64, 128, 1, 8, 4), (64, 128, 1, 4, 5),
    ):  # fmt: skip
        if rows == whole_head or not whole_head:
            yield Tiling(rows, columns, parts, warps, stages)


def _of_prefill(what: Attention) -> Iterator[Choice]:
    for BLOCK_M, BLOCK_T, warps, stages in (
        (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
        (64, 32, 4, 4), (128, 32, 4, 4), (128, 32, 8, 3), (64, 32, 8, 3),
    ):  # fmt: skip
        yield {"BLOCK_M": BLOCK_M, "BLOCK_T": BLOCK_T, "num_warps": warps, "num_stages": stages}


@dataclass
class Table:
    """Measured choices of one GPU, by key: {"choice": {...}, "us": ..., "with": "versions"}."""

    gpu: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def chosen(self, problem: Problem) -> Choice | None:
        """What was measured best, if it was measured and still fits: not by another version, or damaged."""
        found = self.entries.get(problem.key, {}).get("choice")
        choice = next((choice for choice in problem.candidates() if choice == found), None)
        return choice if choice is not None and problem.fits(choice) else None

    def text(self) -> str:
        """As JSON, sorted, a line an entry."""
        rows = [
            f"    {json.dumps(key)}: {json.dumps(self.entries[key], sort_keys=True)}" for key in sorted(self.entries)
        ]
        return f'{{\n  "gpu": {json.dumps(self.gpu)},\n  "entries": {{\n' + ",\n".join(rows) + "\n  }\n}\n"


def table_of(gpu: str) -> Table:
    """What is known of a GPU by torch's name of it: the shipped table, and the user's results over it."""
    made = Table(gpu)
    for path in (SHIPPED / f"{_slug(gpu)}.json", user_file(gpu)):
        made.entries |= _read(path)
    return made


def record(gpu: str, entries: Mapping[str, dict[str, Any]]) -> Path:
    """Adds results to the user's, whatever other processes write at the same time; the file appears whole.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    path = user_file(gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            merged = Table(gpu, _read(path) | dict(entries))
            cache.replace(path, merged.text())
    except OSError as error:
        raise OutputError(f"tuning results cannot be written to {path}: {error}") from error
    return path


def user_file(gpu: str) -> Path:
    """Where a user's results for a GPU are kept."""
    return cache.cache_folder().parent / "tuning" / f"{_slug(gpu)}.json"


def _slug(gpu: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in gpu.lower())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """A file's entries, none where there is no file; a damaged one of the user's is set aside, with a warning."""
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    try:
        entries = json.loads(text)["entries"]
        return {str(key): dict(entry) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if path.parent == SHIPPED:
            warnings.warn(f"the table in {path} cannot be read; it is not used", stacklevel=2)
            return {}
        aside = path.with_suffix(".damaged")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        warnings.warn(f"tuning results in {path} cannot be read; they were moved to {aside.name}", stacklevel=2)
        return {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    import fcntl  # not on Windows, where there is no Triton either

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
