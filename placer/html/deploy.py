"""Deploy: what to type so that each stack runs a placement."""

from __future__ import annotations

import re
from dataclasses import dataclass

from placer.errors import InvalidInput
from placer.model import Model
from placer.placement import Placement

_SUFFIX = re.compile(r"\.?\b(jsonl|json|yaml|npz|npy)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One stack.

    Parameters
    ----------
    name, title : str
        The format's name for ``placer export --to``, and what it is.
    command : str
        Writes the file.
    load_with : str
        Makes the stack load it; empty where it cannot be written.
    notes : tuple of str
        What the stack does of its own accord.
    refused : str
        Why the placement cannot be written for it; empty where it can.
    """

    name: str
    title: str
    command: str
    load_with: str = ""
    notes: tuple[str, ...] = ()
    refused: str = ""


def ways(placement: Placement, path: str, model: Model | None = None) -> list[Way]:
    """All stacks that a file can be written for, those that take this placement first.

    Parameters
    ----------
    placement : Placement
    path : str
        The placement file, as commands name it.
    model : Model, optional
        Says how many layers the model has.

    Examples
    --------
    >>> import numpy as np
    >>> placement = Placement(physical_to_logical=np.array([[1, 0, 1, 2]]), num_experts=3, shape=(1, 1, 2))
    >>> [way.command for way in ways(placement, "p.json") if way.name == "tensorrt_llm"]
    ['placer export p.json --to tensorrt_llm -o tensorrt_llm.yaml']
    """
    import shlex

    from placer import formats
    from placer.export import export

    hidden = None if model is None else model.num_layers
    found = []
    for name in formats.writers():
        title = formats.title(name)
        match = _SUFFIX.search(title)
        file = f"{name}.{match.group(1).lower()}" if match else name
        command = f"placer export {shlex.quote(path)} --to {name} -o {file}"
        try:
            made = export(placement, name, file, num_hidden_layers=hidden)
        except InvalidInput as error:
            found.append(Way(name=name, title=title, command=command, refused=str(error)))
            continue
        try:
            export(placement, name, file)
        except InvalidInput:
            command += (
                f" --num-hidden-layers {hidden}"  # the one thing about the model that a format can want
            )
        found.append(Way(name=name, title=title, command=command, load_with=made.load_with, notes=made.notes))
    if not placement.has_copies and (placement.physical_to_logical >= 0).all():
        found.append(
            Way(
                name="checkpoint",
                title="Any stack with contiguous experts: a checkpoint with its experts permuted",
                command=f"placer permute CHECKPOINT {shlex.quote(path)} -o PLACED",
                load_with="PLACED in place of CHECKPOINT",
                notes=(
                    "gate groups must stay whole where the router has them; traces number the experts anew",
                ),
            )
        )
    return sorted(found, key=lambda way: bool(way.refused))
