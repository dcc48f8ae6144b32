"""What the files of several stacks share: checks of what they cannot say, notes on what they leave out, reading."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.evaluation import format_ids
from placer.placement import Placement

Array = NDArray[Any]

LARGEST = 1 << 28  # slots of a file, or bytes of one of its arrays: far above any model, far below any memory


# -- writing --------------------------------------------------------------------------------------------------


def full_map(placement: Placement, stack: str, *, doubles: bool = True) -> NDArray[np.int32]:
    """`physical_to_logical` for a stack that fills every slot and has no place for a dispatch table.

    Parameters
    ----------
    placement : Placement
    stack : str
        The stack's name.
    doubles : bool
        Whether it loads an expert twice on a rank, as filled placements have it.

    Raises
    ------
    InvalidInput
        When a slot is empty, or there is a table that says something.
    """
    empty = placement.physical_to_logical.reshape(placement.num_layers, placement.num_ranks, -1) < 0
    if empty.any():
        layer, rank = np.argwhere(empty.any(axis=2))[0]
        count = int(empty[layer, rank].sum())
        copies = f"--redundant {placement.num_slots - placement.num_experts} --method eplb"
        ways = "'placer export --fill' puts a second slot of its GPU's own experts there, " * doubles
        raise InvalidInput(
            f"layer {placement.layer_ids[layer]}, rank {rank}: found {count} of {placement.slots_per_rank} slots "
            f"empty (-1), which {stack} cannot load; expected none: {ways}'placer solve {copies}' fills all with copies"
        )
    no_table(placement, stack)
    return placement.physical_to_logical


def no_table(placement: Placement, stack: str) -> None:
    """Refuse a dispatch table, which says where the copies of an expert are used, for a stack that loads none.

    Raises
    ------
    InvalidInput
        When there is a table, and an expert on several ranks.
    """
    if placement.table is not None and on_several_ranks(placement):
        raise InvalidInput(
            f"dispatch table: {stack} loads none, expected a placement without: 'placer export --map-only' "
            "leaves it out, '--to dispatch_table' writes it for placer.dispatch.take_table"
        )


def in_model_order(placement: Placement) -> Placement:
    """The placement with its layers in the order of the model, for files that go by position."""
    order = np.argsort(placement.layer_ids)
    return replace(
        placement,
        physical_to_logical=placement.physical_to_logical[order],
        layer_ids=tuple(sorted(placement.layer_ids)),
        table=None if placement.table is None else placement.table[order],
    )


def no_duplicates(placement: Placement, stack: str) -> None:
    """Refuse an expert that a rank holds twice.

    Raises
    ------
    InvalidInput
        Naming layer, rank and expert.
    """
    for layer, rank, expert in placement.duplicates()[:1]:
        raise InvalidInput(
            f"layer {placement.layer_ids[layer]}, rank {rank}: holds expert {expert} twice, which {stack} "
            "cannot load; expected copies on different ranks"
        )


def on_several_ranks(placement: Placement) -> bool:
    """Whether some expert is on more than one rank, so that a dispatch rule has a choice that matters."""
    ranks = placement.logical_to_physical // placement.slots_per_rank
    return bool(((placement.logical_to_physical >= 0) & (ranks != ranks[..., :1])).any())


def ordinal_note(placement: Placement) -> str:
    """Which layers of the model the rows of a file are that counts MoE layers from 0."""
    held = f"{layers(sorted(placement.layer_ids))} of the model must be all of its MoE layers"
    return f"the file counts MoE layers from 0: {held}"


def layers(ids: Sequence[int]) -> str:
    """Layers by number.

    Examples
    --------
    >>> layers([3]), layers([3, 4, 5]), layers([1, 3])
    ('layer 3', 'layers 3..5', 'layers 1,3')
    """
    return f"layer {ids[0]}" if len(ids) == 1 else f"layers {format_ids(tuple(ids))}"


def dispatch_notes(placement: Placement, stack: str, does: str, rule: str) -> list[str]:
    """A note where a stack chooses among copies otherwise than the placement was made for; `rule` comes closest."""
    if placement.rule == rule or not on_several_ranks(placement):
        return []
    made = f"made for the dispatch rule {placement.rule!r}, which the file cannot say"
    return [f"{made}: {stack} takes {does}; 'placer evaluate --replica-choice {rule}' prices that"]


# -- reading --------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8.

    Raises
    ------
    InvalidInput
        When it cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InvalidInput(f"{path}: not a text file: {error}") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises
    ------
    InvalidInput
        When it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}: not a JSON file: {error}") from None


def placed(
    path: str | os.PathLike[str],
    key: str,
    rows: Any,
    *,
    shape: tuple[int, int, int],
    layer_ids: Sequence[int] | None = None,
) -> Placement:
    """The placement of lists of experts, one a layer, as parsed from a file.

    Every expert has a slot, so the largest id says how many there are.

    Raises
    ------
    InvalidInput
        When they are no such lists, or no placement; with `path` and `key` named.
    """
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise InvalidInput(f"{path}: {key}: expected a list of experts for each layer")
    if (slots := sum(map(len, rows))) > LARGEST:  # lists that share one anchor of YAML
        raise InvalidInput(f"{path}: {key}: found {slots} slots, expected at most {LARGEST}")
    for layer, row in enumerate(rows):
        wrong = [type(item).__name__ for item in row if type(item) is not int]
        if wrong:
            found = f"found {wrong[0]} in list {layer}"
            raise InvalidInput(f"{path}: {key}: {found}, expected the numbers of experts")
    try:
        return Placement(
            physical_to_logical=rows,  # type: ignore[arg-type]
            num_experts=max(map(max, rows)) + 1,
            shape=shape,
            layer_ids=tuple(layer_ids or ()),
            provenance={"read from": Path(path).name},
        )
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
