"""Permuted checkpoints: experts and the router's rows exchanged together, in safetensors shards.

The model computes what it did; only the numbers of its experts change. Every tensor keeps its name, its type, its shape
and its place in its file; its bytes come from the expert that stood elsewhere before. Nothing is converted, so the
inverse gives back the first files, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from placer.checkpoint import Checkpoint, layers_in_words, read_object
from placer.errors import InvalidInput
from placer.folder import check_new, new_folder
from placer.permutation import Permutation
from placer.placement import Placement
from placer.shards import rewrite

RECORD = "placer_permutation.json"
SCHEMA = "placer/permutation/1"


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """What was done to a checkpoint.

    Parameters
    ----------
    output : Path
    model_type : str
        The family of the model.
    permutation : Permutation
        What was applied.
    moved : int
        Experts that have another number now, over all layers.
    left : tuple of int
        MoE layers of the checkpoint that were left as they are.
    size : int
        Bytes of all files together.
    restored : bool or None
        Where the experts stand in their first order again: whether all weights are what they were then, byte for
        byte. None elsewhere.
    notes : tuple of str
        What a user should know, in words.
    """

    output: Path
    model_type: str
    permutation: Permutation
    moved: int
    left: tuple[int, ...]
    size: int
    restored: bool | None
    notes: tuple[str, ...]


def permute(
    checkpoint: str | os.PathLike[str],
    placement: Placement | None,
    output: str | os.PathLike[str],
    *,
    inverse: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Permuted:
    """Write a checkpoint whose consecutive experts stand where a placement puts them.

    Position ``p`` gets expert ``placement.physical_to_logical[layer][p]``, so rank ``p // (num_experts / num_ranks)``
    holds it. Memory is bounded by a few megabytes. The new folder also gets ``placer_permutation.json``: the first
    numbers of its experts, with which `inverse` undoes all permutations.

    Parameters
    ----------
    checkpoint : path
        Folder with config.json and safetensors shards; only read.
    placement : Placement or None
        Without copies and empty slots. None with `inverse`: what the folder's own record says.
    output : path
        Folder to write: new or empty; it appears when it is complete.
    inverse : bool
        Undo the placement instead.
    say : callable
        Gets a line for each shard before it is written.

    Raises
    ------
    InvalidInput
        When the checkpoint or the placement cannot be used, they do not match, gate groups would be taken apart, or
        the output cannot be written; nothing is left behind then.
    """
    source = Checkpoint.open(checkpoint)
    record = _Record.read(source.folder)
    if placement is not None:
        change = Permutation.from_placement(placement)
        change = change.inverse() if inverse else change
    elif inverse and record is not None:
        change = record.permutation.inverse()
    elif inverse:
        raise InvalidInput(f"{source.folder}: holds no {RECORD}, expected one or the placement to undo")
    else:
        raise InvalidInput("no placement, expected one")
    _check_match(source, change, source.folder)
    if record is not None:
        _check_match(source, record.permutation, source.folder / RECORD)
    total = change if record is None else change.after(record.permutation)
    unsure = False
    if inverse and placement is not None and record is not None:
        if record.placement not in (None, placement.digest):
            raise InvalidInput(
                f"{source.folder / RECORD}: found placement {record.placement:.12} as the last applied, expected "
                f"{placement.digest:.12}, which is to be undone; --inverse alone undoes everything recorded"
            )
        unsure = record.placement is None and not total.is_identity
    check_new(output)
    if Path(output).resolve().is_relative_to(source.folder.resolve()):
        raise InvalidInput(f"{output}: lies in {source.folder}, expected a folder outside of the checkpoint")

    plan = _Plan(source, change)
    files = [path for path in source.files if path.as_posix() != RECORD]
    size = sum((source.folder / path).stat().st_size for path in files)
    with new_folder(output, size) as folder:
        for path in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path.as_posix() not in source.shards:
                shutil.copyfile(source.folder / path, folder / path)
        for done, (name, shard) in enumerate(source.shards.items()):
            say(f"{name}: {done + 1} of {len(source.shards)} shards")
            with (folder / name).open("wb") as file:
                rewrite(file, shard, plan.data)
        before = f"{plan.before:064x}" if record is None else record.weights
        back = inverse and (record is None or total.is_identity)
        restored = f"{plan.after:064x}" == before if back and record is not None else None
        if not back:
            # What was applied before the placement that is undone, no record says.
            digest = None if placement is None or inverse else placement.digest
            _Record(permutation=total, weights=before, placement=digest).write(folder)
    left = tuple(layer for layer in source.layers if layer not in change.layer_ids)
    return Permuted(
        output=Path(output),
        model_type=source.model_type,
        permutation=change,
        moved=int((change.old_expert != np.arange(change.num_experts)).sum()),
        left=left,
        size=size,
        restored=restored,
        notes=tuple(_notes(source, left, restored, unsure)),
    )


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What ``placer_permutation.json`` says: the way back.

    Parameters
    ----------
    permutation : Permutation
        From the experts' first numbers to those of the checkpoint beside it.
    weights : str
        Digest of the weights in their first order, see `_Plan`.
    placement : str or None
        Digest of the placement that was applied last; None where that is not known, as after one was undone.
    """

    permutation: Permutation
    weights: str
    placement: str | None

    @classmethod
    def read(cls, folder: Path) -> _Record | None:
        path = folder / RECORD
        if not path.exists():
            return None
        document = read_object(path)
        try:
            if document.get("schema") != SCHEMA:
                raise InvalidInput(f"schema: found {document.get('schema')!r}, expected {SCHEMA!r}")
            weights, layers = document.get("weights"), document.get("layer_ids")
            if not isinstance(weights, str) or not isinstance(layers, list):
                raise InvalidInput("weights or layer_ids: missing or wrong, expected text and a list")
            placement = document.get("placement")
            if placement is not None and not isinstance(placement, str):
                raise InvalidInput(f"placement: found {short(placement)}, expected a digest or null")
            permutation = Permutation(document.get("old_expert"), tuple(layers))  # type: ignore[arg-type]
            return cls(permutation=permutation, weights=weights, placement=placement)
        except RecursionError:
            raise InvalidInput(f"{path}: nested too deeply") from None
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from None

    def write(self, folder: Path) -> None:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "num_experts": self.permutation.num_experts,
            "layer_ids": list(self.permutation.layer_ids),
            "old_expert": self.permutation.old_expert.tolist(),
            "weights": self.weights,
            "placement": self.placement,
        }
        (folder / RECORD).write_text(json.dumps(document) + "\n", encoding="utf-8")


class _Plan:
    """Where the bytes of every tensor come from, and digests of the weights in their old and new order.

    A digest is the sum of the SHA-256 of all pieces with their names, which no order of reading changes. A piece is a
    tensor, or one expert's row of it, in layers left as they are too: digests of different permutations compare.
    """

    def __init__(self, source: Checkpoint, change: Permutation) -> None:
        self._source = source
        self._old_name: dict[str, str] = {}
        self._old_rows: dict[str, list[int]] = {}
        self.before = self.after = 0
        changed = change.rows()
        for layer, found in source.layers.items():
            for name in found.rows:
                tensor = source.tensor(name)
                own = tensor.shape[0] if tensor.shape else 0
                if own and not tensor.nbytes % own:
                    self._old_rows[name] = changed[layer].tolist() if layer in changed else list(range(own))
            if layer in changed and found.parts:
                for new, old in enumerate(changed[layer].tolist()):
                    for part, name in found.parts[new].items():
                        self._old_name[name] = found.parts[old][part]

    def data(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces."""
        if name not in self._old_rows:
            old = self._old_name.get(name, name)
            tensor = self._source.tensor(old)
            yield from self._read(old, tensor.start, tensor.stop, old, name)
            return
        for new, row in enumerate(self._old_rows[name]):
            yield from self._read(name, *self._source.tensor(name).row(row), f"{name}/{row}", f"{name}/{new}")

    def _read(self, name: str, start: int, stop: int, old: str, new: str) -> Iterator[bytes]:
        content = hashlib.sha256()
        for chunk in self._source.holder[name].chunks(start, stop):
            content.update(chunk)
            yield chunk
        self.before = (self.before + _named(old, content.digest())) % (1 << 256)
        self.after = (self.after + _named(new, content.digest())) % (1 << 256)


def _named(name: str, digest: bytes) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass") + b"\0" + digest).digest())


def _check_match(source: Checkpoint, change: Permutation, where: Path) -> None:
    if source.num_experts not in (None, change.num_experts):
        raise InvalidInput(
            f"{where}: a model of {source.num_experts} experts, the permutation is of {change.num_experts}"
        )
    for layer in change.layer_ids:
        source.check_layer(layer, change.num_experts)
    try:
        change.check_groups(source.num_groups)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def _notes(source: Checkpoint, left: tuple[int, ...], restored: bool | None, unsure: bool) -> Iterator[str]:
    if left:
        yield f"not in the placement, so left alone: {layers_in_words(left)}"
    for path in source.other_weights:
        yield f"{path} is no shard of the checkpoint and was copied as it is"
    for path in source.passed_over:
        yield f"{path} was left out"
    if restored is False:
        yield "the weights are not those that were permuted at first: they have changed since"
    if unsure:
        yield f"{RECORD} does not say which placement was applied last: undone as given"
