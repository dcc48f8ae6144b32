"""TensorRT-LLM's expert statistics (EXPERT_STATISTIC_PATH folder): loads, or tokens where they were dumped.

A folder with ``meta_info.json`` (``num_experts``, ``num_experts_per_token``) and a file of each rank:
``rank{r}.safetensors``, the tokens of every expert under ``{iteration}_{layer}``, which become counts; and in newer
versions ``rank{r}_raw.safetensors``, the experts of every token under the same names, which become a trace with source
rank and step. Layers are numbered as in the model.

Traps: with a load balancer the ids are slots, not experts, so record without one; the iterations are those of
``EXPERT_STATISTIC_ITER_RANGE``; there are no request ids.

Read: NVIDIA/TensorRT-LLM, ``examples/wide_ep/ep_load_balancer`` and ``ExpertStatistic``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.counts import Counts
from placer.errors import InvalidInput
from placer.formats import Hints, _loads
from placer.model import Model
from placer.shards import Shard
from placer.trace import MAX_EXPERTS, Trace

Array = NDArray[Any]
Shards = dict[int, tuple[Shard, dict[tuple[int, int], str]]]

_META = "meta_info.json"
_RANK = re.compile(r"rank([0-9]{1,9})(_raw)?\.safetensors")
_KEY = re.compile(r"([0-9]{1,18})_([0-9]{1,9})")
_SAID = "TensorRT-LLM expert statistics"


def sniff(path: Path) -> bool:
    """Whether a folder holds ``meta_info.json`` and files of ranks."""
    try:
        return (path / _META).is_file() and any(_RANK.fullmatch(file.name) for file in path.iterdir())
    except OSError:
        return False


def read(paths: Sequence[Path], hints: Hints) -> Trace | Counts:
    """The trace of a folder where its tokens were dumped, else its counts."""
    if len(paths) != 1 or not paths[0].is_dir():
        raise InvalidInput(f"{paths[0]}: found {len(paths)} paths, expected one folder with {_META}")
    folder = paths[0]
    experts, top_k = _meta(folder / _META)
    _loads.agreed(experts, hints, str(folder / _META))
    if hints.top_k not in (None, top_k):
        raise InvalidInput(
            f"{folder / _META}: found {top_k} experts a token, expected {hints.top_k} (--top-k)"
        )
    loads, tokens = _shards(folder, raw=False), _shards(folder, raw=True)
    if not tokens:
        return _counts(loads, experts, hints, folder)
    if missing := sorted(loads.keys() - tokens.keys()):
        raise InvalidInput(f"{folder}: rank {missing[0]} has counts but no rank{missing[0]}_raw.safetensors")
    return _trace(tokens, experts, top_k, hints, folder)


def _meta(path: Path) -> tuple[int, int]:
    """Experts of a layer, and of a token."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InvalidInput(f"{path}: not JSON") from None
    numbers = []
    for key, most in (("num_experts", MAX_EXPERTS), ("num_experts_per_token", MAX_EXPERTS)):
        value = meta.get(key) if isinstance(meta, dict) else None
        if type(value) is not int or not 1 <= value <= most:
            raise InvalidInput(f"{path}: {key}: found {_loads.told(value)}, expected 1 to {most}")
        numbers.append(value)
    return numbers[0], numbers[1]


def _shards(folder: Path, *, raw: bool) -> Shards:
    """The file of each rank, and its tensors by iteration and layer."""
    shards: Shards = {}
    for file in sorted(folder.iterdir()):
        match = _RANK.fullmatch(file.name)
        if match is None or bool(match[2]) != raw:
            continue
        shard = Shard.open(file)
        names: dict[tuple[int, int], str] = {}
        for name in shard.tensors:
            key = _KEY.fullmatch(name)
            if key is None or (at := (int(key[1]), int(key[2]))) in names:
                raise InvalidInput(
                    f"{file}: found tensor {_loads.told(name)}, expected ITERATION_LAYER, each once"
                )
            names[at] = name
        if int(match[1]) in shards:
            raise InvalidInput(f"{file}: rank {int(match[1])} has two files")
        shards[int(match[1])] = shard, names
    return shards


def _layer_ids(shards: Shards, hints: Hints, folder: Path) -> list[int]:
    """The layers recorded, or those that are asked for."""
    found = sorted({layer for _, names in shards.values() for _, layer in names})
    if not found or len(found) > _loads.MAX_LAYERS:
        raise InvalidInput(f"{folder}: found {len(found)} layers, expected 1 to {_loads.MAX_LAYERS}")
    if hints.layer_ids is None:
        return found
    if missing := sorted(set(hints.layer_ids) - set(found)):
        raise InvalidInput(
            f"{folder}: found no layer {missing[0]} (--layer-ids); {_loads.told(found)} are there"
        )
    return list(hints.layer_ids)


def _counts(shards: Shards, experts: int, hints: Hints, folder: Path) -> Counts:
    ids = _layer_ids(shards, hints, folder)
    row = {layer: at for at, layer in enumerate(ids)}
    total = np.zeros((len(ids), experts), np.int64)
    for shard, names in shards.values():
        for (_, layer), name in names.items():
            if layer not in row:
                continue
            where, found = f"{shard.path}: {name}", shard.array(name)
            if found.shape != (experts,):
                raise InvalidInput(f"{where}: found {_loads.told(found)}, expected ({experts},) loads")
            total[row[layer]] = _loads.added(((where, total[[row[layer]]]), (where, found[None])))[0]
    if not total.any():
        raise InvalidInput(f"{folder}: found no load in any of {len(ids)} layers")
    return Counts(
        load=total,
        layer_ids=tuple(ids),
        model=hints.model,
        num_groups=Model.for_trace_name(hints.model, experts).num_groups,
        source=f"{_SAID}, {len(shards)} ranks",
        name=folder.name,
    )


def _trace(shards: Shards, experts: int, top_k: int, hints: Hints, folder: Path) -> Trace:
    ids = _layer_ids(shards, hints, folder)
    blocks = []  # of one iteration on one rank: iteration, rank, tokens
    for rank, (_, names) in shards.items():
        blocks += [(step, rank) for step in {step for step, _ in names}]
    blocks.sort()
    parts = [_block(*shards[rank], step, ids, experts, top_k) for step, rank in blocks]
    tokens = [len(part) for part in parts]
    if not sum(tokens):
        raise InvalidInput(f"{folder}: found no token in {len(blocks)} iterations of ranks")
    model = Model.for_trace_name(hints.model, experts)
    try:
        return Trace(
            topk_idx=np.concatenate(parts),
            num_experts=experts,
            source_rank=np.repeat([rank for _, rank in blocks], tokens),
            step=np.repeat([step for step, _ in blocks], tokens),
            model=hints.model,
            num_groups=model.num_groups,
            topk_groups=model.topk_groups,
            layer_ids=tuple(ids),
            source=f"{_SAID}, {len(shards)} ranks",
            name=folder.name,
        )
    except InvalidInput as error:
        raise InvalidInput(f"{folder}: {error}") from None


def _block(
    shard: Shard, names: dict[tuple[int, int], str], step: int, ids: list[int], experts: int, top_k: int
) -> NDArray[np.int16]:
    """The experts of one rank's tokens in one iteration, (tokens, layers, top_k)."""
    columns: list[NDArray[np.int16]] = []
    for layer in ids:
        where = f"{shard.path}: {step}_{layer}"
        if (step, layer) not in names:
            raise InvalidInput(f"{where}: no such tensor; expected every layer in every iteration")
        found = shard.array(names[step, layer])
        if found.ndim != 2 or found.shape[1] != top_k or found.dtype.kind not in "iu":
            raise InvalidInput(f"{where}: found {_loads.told(found)}, expected integers (tokens, {top_k})")
        if len(found) != len(columns[0] if columns else found):
            raise InvalidInput(f"{where}: found {len(found)} tokens, layer {ids[0]} has {len(columns[0])}")
        if found.size and (int(found.min()) < -1 or int(found.max()) >= experts):
            wrong = int(found.min()) if int(found.min()) < -1 else int(found.max())
            raise InvalidInput(f"{where}: found expert {wrong}, expected -1 to {experts - 1}")
        columns.append(found.astype(np.int16))
    return np.stack(columns, axis=1)
