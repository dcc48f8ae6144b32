"""vLLM's proposed load statistics (eplb_load_stats, JSONL): loads only.

One JSON object a line, a window of engine steps each: the load of every slot (``expert_load``) and the expert in it
(``p2l_map``), both ``[layers][slots]``. Windows add up; each is mapped back by its own map, so experts may have moved
in between. Layers are MoE layers counted from 0; ``--layer-ids`` gives the model's numbers. ``eplb_load_meta`` lines
are skipped.

Read: vllm-project/vllm#41141 (``expert_load_stats_path``), version 1, not in a release.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placer.counts import Counts
from placer.errors import InvalidInput
from placer.formats import Hints, _loads

_RECORD, _META = "eplb_load_stats", "eplb_load_meta"


def sniff(path: Path) -> bool:
    """Whether a file begins like a line of load statistics."""
    try:
        with path.open("rb") as file:
            begin = file.read(4096)
    except OSError:
        return False
    return begin.lstrip()[:1] == b"{" and any(f'"{name}"'.encode() in begin for name in (_RECORD, _META))


def read(paths: Sequence[Path], hints: Hints) -> Counts:
    """The sum of all windows."""
    load = _loads.added(window for path in paths for window in _windows(path))
    return _loads.counts(load, hints, paths, "vLLM eplb_load_stats", moe_only=True)


def _windows(path: Path) -> Iterator[tuple[str, Any]]:
    """The load of experts in each line, and where it stands."""
    found = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}: line {number}"
                if line.strip() and (record := _record(line, where)) is not None:
                    held, experts = _loads.experts_of(
                        _rectangle(record, "p2l_map", where), f"{where}: p2l_map"
                    )
                    physical = _rectangle(record, "expert_load", where)
                    yield where, _loads.unmapped(physical, held, experts, f"{where}: expert_load")
                    found += 1
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path}: not a text file, expected JSON lines") from None
    if not found:
        raise InvalidInput(f"{path}: found no line of {_RECORD}")


def _record(line: str, where: str) -> dict[str, Any] | None:
    """One line; None for those that hold no loads."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidInput(f"{where}: not JSON, or cut off") from None
    kind = record.get("record_type") if isinstance(record, dict) else None
    if kind not in (_RECORD, _META):
        raise InvalidInput(f"{where}: record_type: found {_loads.told(kind)}, expected {_RECORD!r}")
    if record.get("version") != 1:
        raise InvalidInput(f"{where}: version: found {_loads.told(record.get('version'))}, expected 1")
    return None if kind == _META else dict(record)


def _rectangle(record: dict[str, Any], key: str, where: str) -> Any:
    try:
        return np.asarray(record.get(key))
    except (ValueError, OverflowError):
        raise InvalidInput(
            f"{where}: {key}: found rows of unequal length, expected [layers][slots]"
        ) from None
