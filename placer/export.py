"""Export: a placement as the file that a stack loads, and how to make it load that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placer.errors import InvalidInput
from placer.formats import Target, writer
from placer.model import Model
from placer.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Export:
    """A file for a stack.

    Parameters
    ----------
    content : bytes
        The file.
    load_with : str
        The options, settings or code with which the stack loads it, in one line.
    notes : tuple of str
        What the file leaves out or takes for granted, and what the stack does of its own accord.
    """

    content: bytes
    load_with: str
    notes: tuple[str, ...]


def export(
    placement: Placement,
    to: str,
    path: str,
    *,
    model: Model | None = None,
    num_hidden_layers: int | None = None,
) -> Export:
    """A placement in the format of a stack; nothing is written.

    Parameters
    ----------
    placement : Placement
    to : str
        A format of `placer.formats.writers`.
    path : str
        Where the file will be, for `Export.load_with`.
    model : Model, optional
        Says how many layers there are, and is compared with the placement.
    num_hidden_layers : int, optional
        Layers of the model, dense ones included; the model's by default.

    Raises
    ------
    InvalidInput
        When the format cannot say what the placement holds, or something about the model is missing or contradicts.

    Examples
    --------
    >>> placement = Placement(physical_to_logical=np.array([[1, 0, 1, 2]]), num_experts=3, shape=(1, 1, 2))
    >>> made = export(placement, "sglang", "map.json", num_hidden_layers=1)
    >>> made.content
    b'{"physical_to_logical_map": [[1, 0, 1, 2]]}\\n'
    >>> made.load_with
    '--init-expert-location map.json --ep-size 2 --ep-num-redundant-experts 1 --ep-dispatch-algorithm static'
    """
    stack = writer(to)
    notes = []
    if model is not None:
        if model.num_experts not in (None, placement.num_experts):
            found = f"--model: {model.name} has {model.num_experts} experts a layer"
            raise InvalidInput(f"{found}, expected {placement.num_experts}, those of the placement")
        if model.num_moe_layers not in (None, placement.num_layers):
            notes = [
                f"{model.name} has {model.num_moe_layers} MoE layers, the placement {placement.num_layers}"
            ]
        num_hidden_layers = num_hidden_layers or model.num_layers
    target = Target(num_hidden_layers=num_hidden_layers)
    return Export(
        content=stack.write(placement, target),
        load_with=stack.load_with(placement, path),
        notes=(*notes, *stack.notes(placement, target)),
    )


def fill(placement: Placement) -> Placement:
    """The placement with no slot empty, for stacks that know no empty ones.

    An empty slot gets an expert that its rank holds already and no other rank does: its tokens then use two slots of
    one GPU, so that traffic and the load of every GPU stay exactly as they were, under each dispatch rule.

    Raises
    ------
    InvalidInput
        When all experts of a rank with an empty slot are on other ranks, too.

    Examples
    --------
    >>> placement = Placement(physical_to_logical=np.array([[0, 1, 2, 0, 3, -1]]), num_experts=4, shape=(1, 1, 2))
    >>> fill(placement).physical_to_logical.tolist()
    [[0, 1, 2, 0, 3, 3]]
    """
    filled = placement.physical_to_logical.copy()
    per_rank = filled.reshape(placement.num_layers, placement.num_ranks, -1)
    for layer, rank in np.argwhere((per_rank < 0).any(axis=2)):
        slots = per_rank[layer, rank]
        held, times = np.unique(slots[slots >= 0], return_counts=True)
        own = held[times == placement.replica_count[layer, held]]
        if not len(own):
            raise InvalidInput(
                f"layer {placement.layer_ids[layer]}, rank {rank}: cannot be filled without changing loads: every "
                "expert there has copies on other ranks"
            )
        slots[slots < 0] = np.resize(own, int((slots < 0).sum()))
    return replace(placement, physical_to_logical=filled)
