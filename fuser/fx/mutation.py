"""Operators in place that do what their functional forms do, because nothing else sees the tensor they change.

The others are left to torch, which traces the whole program again to be rid of them.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx import Node as Call
from torch.utils import _pytree as pytree

from fuser.fx.table import ROWS


@dataclass(frozen=True)
class Form:
    """What a call in place may be read as."""

    row: str  # of the table
    tensor: list[Call]  # the calls that give the tensor which it changes, itself among them


def functional_forms(module: GraphModule) -> dict[Call, Form]:
    """The calls in a graph that may be read as if they gave a new tensor, which takes the place of the one they change."""
    calls = list(module.graph.nodes)
    places = {call: place for place, call in enumerate(calls)}
    last = {call: max((places[user] for user in call.users), default=-1) for call in calls}
    rows = {call: row for call in calls if (row := _functional(call)) is not None}
    if not rows:
        return {}
    made: dict[Call, Call] = {}  # the call that made a tensor, for those in place that give it again
    same: dict[Call, list[Call]] = defaultdict(list)
    for call in calls:
        given = call.args[0] if call.args else None
        made[call] = made[given] if isinstance(given, Call) and _is_in_place(call.target) else call
        same[made[call]].append(call)
    sharing = _sharing(calls)
    return {
        call: Form(row, same[made[call]])
        for call, row in rows.items()
        if made[call] is not call
        and not any(
            other.op in ("placeholder", "get_attr")
            or (places[other] < places[call] < last[other] and made[other] is not made[call])
            for shared in sharing[call]
            for other in shared
        )
    }


def _is_in_place(target: Any) -> bool:
    """Whether an operator changes its first argument, which it gives, and nothing else."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    written = [
        argument.alias_info is not None and argument.alias_info.is_write for argument in target._schema.arguments
    ]
    return written == [True] + [False] * (len(written) - 1) and len(target._schema.returns) == 1


def _functional(call: Call) -> str | None:
    """The row of the operator that gives what a call in place writes; None for other calls and where there is none."""
    if call.op != "call_function" or not _is_in_place(call.target):
        return None
    namespace, name, overload = str(call.target).split(".")
    row = f"{namespace}.{name.removesuffix('_')}.{overload}"
    return row if row in ROWS else None


def _sharing(calls: list[Call]) -> dict[Call, list[set[Call]]]:
    """For each call, the calls that may give tensors in the same memory as its own: as they were traced, and by the
    operators' schemas, which are all that is left of it in a program that was saved."""
    sets: dict[Any, set[Call]] = defaultdict(set)
    keys: dict[Call, set[Any]] = {}
    for call in calls:
        tensors = [leaf for leaf in pytree.tree_leaves(call.meta.get("val")) if isinstance(leaf, torch.Tensor)]
        keys[call] = {tensor.untyped_storage()._cdata for tensor in tensors}
        keys[call] = keys[call].union(*(keys[given] for given in _parts_of(call)))
        for key in keys[call]:
            sets[key].add(call)
    return {call: [sets[key] for key in keys[call]] for call in calls}


def _parts_of(call: Call) -> list[Call]:
    """The arguments that a call may give again, or views of them."""
    target = call.target
    if call.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return call.all_input_nodes  # an element of a tuple, a graph
    if all(result.alias_info is None for result in target._schema.returns):
        return []
    shared = [
        given for given, one in zip(call.args, target._schema.arguments, strict=False) if one.alias_info is not None
    ]
    return [given for given in pytree.tree_leaves(shared) if isinstance(given, Call)]
