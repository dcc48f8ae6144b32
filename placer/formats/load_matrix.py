"""Matrices of expert loads, as EPLB takes them (.npy, .npz, .pt, .json): loads only.

Tokens of each expert as whole numbers, ``(layers, experts)`` or ``(steps, layers, experts)``, of which steps are added
up. Rows are the model's layers in order, those without load dense, unless ``--layer-ids`` names them. In dicts and
``.npz`` files the matrix stands under ``logical_count`` (SGLang), ``load``, ``expert_load`` or ``weight``; one array
under another name is taken when the format is named. ``{"load_history": [{"logical_expert_load": ..}, ..]}``, the
expert-load file of the ADRS EPLB task, is read as well. Files of `placer.counts.Counts` are taken as they are, and
several that agree are added up.

Read: deepseek-ai/EPLB d52c72d; vllm-ascend ``examples/eplb/eplb_strategy.py``; SGLang 0.5 ``--init-expert-location``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from placer import npz, torchfile
from placer.counts import Counts, whole_loads
from placer.errors import InvalidInput
from placer.formats import Hints, _loads, _npy

KEYS = ("logical_count", "load", "expert_load", "weight")

_HISTORY, _LOAD = "load_history", "logical_expert_load"
_NESTED = re.compile(rb"\s*\[\s*\[[\s\[]*[0-9]")
_KEY = re.compile(rb'\s*\{\s*"(%s)"\s*:' % "|".join((*KEYS, _HISTORY)).encode())
_TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor"  # how the pickle of a tensor alone begins


def sniff(path: Path) -> bool:
    """Whether a file holds a matrix of numbers alone, or names one of them first; arrays of ids are none."""
    try:
        with path.open("rb") as file:
            begin = file.read(4096)
    except OSError:
        return False
    try:
        if begin.startswith(_npy.MAGIC):
            return _is_matrix(_npy.from_file(path)) and not _npy.looks_routed(path)
        if not begin.startswith(b"PK"):
            return bool(_NESTED.match(begin) or _KEY.match(begin))
        if torchfile.head(path, len(_TENSOR)) == _TENSOR:
            return _is_matrix(torchfile.load(path))
        return Counts.holds(path) or bool({*KEYS} & {*npz.names(path)})
    except InvalidInput:
        return False


def read(paths: Sequence[Path], hints: Hints) -> Counts:
    """The sum of the matrices in some files; hints must agree with counts, and name a model where they name none.

    Raises
    ------
    InvalidInput
        When a file is damaged, or one differs from the first or from a hint.
    """
    counts = [path for path in paths if Counts.holds(path)]
    if counts:
        if alone := [path for path in paths if path not in counts]:
            raise InvalidInput(
                f"{alone[0]}: found a matrix of loads alone, expected counts as in {counts[0]}; convert it first"
            )
        return _counts(counts, hints)
    load = _loads.added((str(path), _matrix(path)) for path in paths)
    return _loads.counts(load, hints, paths, "load matrix")


def _counts(paths: Sequence[Path], hints: Hints) -> Counts:
    """The sum of the counts in some files, which must be of the same layers and model."""
    found = [Counts.open(path) for path in paths]
    found = [counts if counts.model else replace(counts, model=hints.model) for counts in found]
    first = found[0]
    for path, counts in zip(paths, found, strict=True):
        for key in ("num_experts", "layer_ids"):
            hint, value = getattr(hints, key), getattr(counts, key)
            if hint not in (None, value):
                raise InvalidInput(f"{path}: {key} is {value!s:.60}, expected {hint!s:.60}")
        for key in ("num_experts", "layer_ids", "num_groups", "model"):
            value, expected = getattr(counts, key), getattr(first, key)
            if value != expected:
                raise InvalidInput(
                    f"{path}: {key} is {value!s:.60}, expected {expected!s:.60} as in {paths[0]}"
                )
    tokens = [counts.num_tokens for counts in found if counts.num_tokens is not None]
    sources = dict.fromkeys(counts.source for counts in found if counts.source is not None)
    return replace(
        first,
        load=_loads.added((str(path), counts.load) for path, counts in zip(paths, found, strict=True)),
        num_tokens=sum(tokens) if len(tokens) == len(found) else None,
        model=hints.model or first.model,
        source="; ".join(sources) or None,
    )


def _is_matrix(found: Any) -> bool:
    """Whether something is an array of one or several matrices of loads, by its shape and dtype."""
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iuf" or found.size == 0:
        return False
    return found.ndim == 2 or (found.ndim == 3 and (found.dtype.kind == "f" or int(found.min()) >= 0))


def _matrix(path: Path) -> Any:
    """The loads of one file, steps added up."""
    found = _content(path)
    if isinstance(found, dict):
        found = _entry(found, str(path))
    try:
        loads = np.asarray(found)
    except (ValueError, OverflowError):
        raise InvalidInput(f"{path}: found rows of unequal length, expected (layers, experts)") from None
    if loads.ndim not in (2, 3) or loads.dtype.kind not in "iuf":
        raise InvalidInput(
            f"{path}: found {_loads.told(loads)}, expected numbers (layers, experts), or of steps"
        )
    checked = whole_loads(loads, str(path))
    return checked if checked.ndim == 2 else checked.sum(axis=0)


def _content(path: Path) -> Any:
    """What a file holds, by its first bytes."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
        if begin.startswith(_npy.MAGIC):
            return _npy.from_file(path)
        if begin.startswith(b"PK"):
            return torchfile.load(path) if torchfile.head(path) else _archive(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}: no .npy, .npz, .pt or JSON file, or a damaged one") from None


def _entry(found: dict[Any, Any], where: str) -> Any:
    """The matrix in a dict."""
    history = found.get(_HISTORY)
    if isinstance(history, list) and all(isinstance(window, dict) for window in history):
        return [window.get(_LOAD) for window in history]
    for key in KEYS:
        if key in found:
            return found[key]
    raise InvalidInput(f"{where}: found keys {_loads.told(list(found))}, expected one of {', '.join(KEYS)}")


def _archive(path: Path) -> dict[str, Any]:
    """The matrix of an .npz under its name, or under the first known one where it stands alone."""
    members = npz.names(path)
    known = [key for key in KEYS if key in members]
    if members and not known and len(members) != 1:
        raise InvalidInput(f"{path}: found arrays {_loads.told(members)}, expected one of {', '.join(KEYS)}")
    key = (known or members or KEYS)[0]
    return {KEYS[0]: npz.read_members(path, [key])[key]}
