"""SGLang's expert distribution recorder (.pt): tokens, or loads only.

``--expert-distribution-recorder-mode`` decides what its files hold: ``per_token`` the experts of every token, which
become a trace; ``per_pass``, ``stat`` and ``stat_approx`` loads, which become counts. Several files are one recording:
the ranks write one each, and each dump writes anew.

Traps: ids are slots, mapped back by the map at the time of the dump, so experts must not have moved while it recorded;
the layers are all hidden layers, with nothing in the dense ones; k is 8 with -1 for fewer. Under tensor parallelism
several ranks record the same tokens: these are taken once. There are no request ids: prefill passes tell their
requests apart, decode passes do not.

Read: SGLang 0.5, ``sglang/srt/eplb/expert_distribution.py``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer import torchfile
from placer.counts import Counts, whole_loads
from placer.errors import InvalidInput
from placer.formats import Hints, _loads
from placer.model import Model
from placer.trace import Trace

Array = NDArray[Any]

_MARKS = (b"forward_pass_id", b"last_physical_to_logical_map", b"logical_count")  # keys of its documents
_SAID = "SGLang expert distribution recorder"
_LARGEST = 2**62  # of any number in a file
_LOOKED_AT = 64  # tokens of a pass


def sniff(path: Path) -> bool:
    """Whether a file, or one in a folder, begins like a dump of the recorder."""
    try:
        files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    except OSError:
        return False
    return any(mark in torchfile.head(file) for file in files for mark in _MARKS)


def read(paths: Sequence[Path], hints: Hints) -> Trace | Counts:
    """The trace of a ``per_token`` recording, the counts of any other."""
    files = [file for path in paths for file in (sorted(path.glob("*.pt")) if path.is_dir() else [path])]
    if not files:
        raise InvalidInput(f"{paths[0]}: found no .pt file in this folder")
    dumps = {file: _document(file) for file in files}
    stat = [file for file, dump in dumps.items() if "logical_count" in dump]
    if len(stat) == len(files):
        loads = (
            (where, _summed(dumps[file]["logical_count"], where))
            for file in stat
            for where in [f"{file}: logical_count"]
        )
        return _loads.counts(_loads.added(loads), hints, paths, f"{_SAID}, stat")
    if stat:
        raise InvalidInput(f"{stat[0]}: holds loads alone (stat); expected passes as in {files[0]}")
    passes = sorted(
        (found for file, dump in dumps.items() for found in _passes(file, dump)),
        key=lambda found: (found.step, found.rank),
    )
    _check_once(passes)
    number = _loads.agreed(passes[0].num_experts, hints, str(passes[0].file))
    with_tokens = [found for found in passes if found.topk is not None]
    if len(with_tokens) == len(passes):
        return _trace(passes, number, hints, paths)
    if with_tokens:
        raise InvalidInput(
            f"{with_tokens[0].file}: holds tokens (per_token), other files only loads (per_pass)"
        )
    parts = ((where, found.load) for found in passes for where in [f"{found.file}: pass {found.step}"])
    return _loads.counts(_loads.added(parts), hints, paths, f"{_SAID}, per_pass")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pass:
    """One forward pass on one rank."""

    file: Path
    step: int
    rank: int
    part: str
    experts: Array  # of each slot
    num_experts: int
    load: Array | None
    topk: Array | None  # (layers, tokens, 8) slots, -1 = none
    lengths: list[int] | None  # tokens of each request, where the pass is a prefill

    @property
    def num_tokens(self) -> int:
        return 0 if self.topk is None else int(self.topk.shape[1])


def _document(file: Path) -> dict[str, Any]:
    found = torchfile.load(file)
    if not isinstance(found, dict) or not ("logical_count" in found or "records" in found):
        raise InvalidInput(f"{file}: no dump of SGLang's recorder: found no records and no logical_count")
    return found


def _summed(count: Any, where: str) -> Array:
    """``(steps, layers, experts)`` loads without the steps; rows of the ring that were never written are zero."""
    if not isinstance(count, np.ndarray) or count.ndim not in (2, 3):
        raise InvalidInput(f"{where}: found {_loads.told(count)}, expected loads (steps, layers, experts)")
    loads = whole_loads(count, where)
    return loads if loads.ndim == 2 else loads.sum(axis=0)


def _passes(file: Path, dump: dict[str, Any]) -> Iterator[_Pass]:
    """What the records of a file say, checked, with the load of experts for that of slots."""
    records = dump["records"]
    if not isinstance(records, list) or not records:
        raise InvalidInput(
            f"{file}: records: found {_loads.told(records)}, expected a list of forward passes"
        )
    held, number = _loads.experts_of(
        dump.get("last_physical_to_logical_map"), f"{file}: last_physical_to_logical_map"
    )
    for index, record in enumerate(records):
        where = f"{file}: records[{index}]"
        if not isinstance(record, dict):
            raise InvalidInput(f"{where}: found {_loads.told(record)}, expected a forward pass")
        step, rank = (_integer(record.get(key), f"{where}: {key}") for key in ("forward_pass_id", "rank"))
        topk, load = record.get("topk_ids_of_layer"), record.get("global_physical_count")
        if topk is None:
            load = _loads.unmapped(load, held, number, f"{where}: global_physical_count")
        else:
            _check_slots(topk, held, f"{where}: topk_ids_of_layer")
        yield _Pass(
            file=file,
            step=step,
            rank=rank,
            part=str(record.get("gatherer_key"))[:32],
            experts=held,
            num_experts=number,
            load=None if topk is not None else load,
            topk=topk,
            lengths=None if topk is None else _lengths(record.get("extend_seq_lens"), topk.shape[1]),
        )


def _integer(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise InvalidInput(f"{where}: found {_loads.told(value)}, expected an integer from 0")
    return value


def _lengths(value: Any, tokens: int) -> list[int] | None:
    """Tokens of each request, where they are known and add up."""
    if not isinstance(value, list) or not all(type(length) is int and length >= 0 for length in value):
        return None
    return value if sum(value) == tokens else None


def _check_slots(topk: Any, held: Array, where: str) -> None:
    layers, slots = held.shape
    shape: tuple[int, ...] = topk.shape if isinstance(topk, np.ndarray) and topk.dtype.kind == "i" else ()
    if len(shape) != 3 or shape[0] != layers or shape[2] == 0:
        raise InvalidInput(
            f"{where}: found {_loads.told(topk)}, expected integers ({layers} layers, tokens, k)"
        )
    if topk.size and (topk.min() < -1 or topk.max() >= slots):
        wrong = int(topk.min()) if topk.min() < -1 else int(topk.max())
        hint = "; shared experts in it? record with --disable-shared-experts-fusion" if wrong >= slots else ""
        raise InvalidInput(f"{where}: found slot {wrong}, expected -1 to {slots - 1}{hint}")
    for layer in np.flatnonzero((held < 0).any(axis=1)):
        if (held[layer][topk[layer][topk[layer] >= 0]] < 0).any():
            raise InvalidInput(f"{where}: found a token of layer {layer} in a slot that holds no expert")


def _check_once(passes: list[_Pass]) -> None:
    """Refuse passes of which two files tell: dumps of two servers, or one file twice."""
    seen: dict[tuple[int, int, str], Path] = {}
    for found in passes:
        if (found.num_experts, found.experts.shape) != (passes[0].num_experts, passes[0].experts.shape):
            raise InvalidInput(f"{found.file}: its map has another size than that of {passes[0].file}")
        key = (found.step, found.rank, found.part)
        if key in seen:
            raise InvalidInput(
                f"{found.file}: pass {found.step} of rank {found.rank} is also in {seen[key]}; "
                "convert recordings of different runs one by one"
            )
        seen[key] = found.file


# -- tokens --------------------------------------------------------------------------------------------


def _trace(passes: list[_Pass], num_experts: int, hints: Hints, paths: Sequence[Path]) -> Trace:
    kept, left_out = _distinct_ranks(passes)
    where = str(paths[0])
    slots = [found.topk for found in kept if found.topk is not None and found.num_tokens]
    if not slots:
        raise InvalidInput(f"{where}: found no token in {len(kept)} passes")
    # Nothing but 0 in a layer: before the first reset the recorder's buffer holds zeros.
    used = np.logical_or.reduce([topk.max(axis=(1, 2)) > 0 for topk in slots])
    rows, layer_ids = _loads.moe_rows(used, hints, where)
    top_k = max(_columns(topk, rows) for topk in slots)
    if top_k == 0 or hints.top_k not in (None, top_k):
        raise InvalidInput(f"{where}: found {top_k} experts a token, expected {hints.top_k or 'some'}")
    ids = np.concatenate([_logical(found, rows, top_k) for found in kept])
    step, rank, sequence = _origins(kept)
    routed = (ids >= 0).any(axis=(1, 2))  # padding is not
    model = Model.for_trace_name(hints.model, num_experts)
    prefill = [found.lengths is not None for found in kept if found.num_tokens]
    if left_out:
        ranks = ", ".join(map(str, left_out))
        warnings.warn(f"ranks {ranks} recorded the same tokens as others: left out", stacklevel=2)
    try:
        return Trace(
            topk_idx=ids[routed],
            num_experts=num_experts,
            sequence=sequence[routed] if all(prefill) else None,
            source_rank=rank[routed],
            step=step[routed],
            model=hints.model,
            num_groups=model.num_groups,
            topk_groups=model.topk_groups,
            layer_ids=layer_ids,
            phase="prefill" if all(prefill) else None,
            source=f"{_SAID}, per_token",
            name=paths[0].stem,
        )
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error} (did experts move while it recorded?)") from None


def _distinct_ranks(passes: list[_Pass]) -> tuple[list[_Pass], list[int]]:
    """The passes of ranks that saw tokens of their own, and the ranks that saw the same throughout as a lower one."""
    first: dict[bytes, list[int]] = {}  # ranks by their first tokens, which mostly tell them apart
    for rank in sorted({found.rank for found in passes}):
        first.setdefault(_digest(passes, rank, _LOOKED_AT), []).append(rank)
    left_out = []
    for alike in first.values():
        known: set[bytes] = set()
        for rank in alike if len(alike) > 1 else ():
            digest = _digest(passes, rank, None)
            left_out += [rank] * (digest in known)
            known.add(digest)
    return [found for found in passes if found.rank not in left_out], sorted(left_out)


def _digest(passes: list[_Pass], rank: int, tokens: int | None) -> bytes:
    """Of the experts of the first `tokens` of each pass of a rank, or of all."""
    digest = hashlib.sha256()
    for found in passes:
        if found.rank == rank:
            digest.update(f"{found.step} {found.part} {found.num_tokens}".encode())
            digest.update(_logical(found, list(range(len(found.experts))), tokens=tokens).tobytes())
    return digest.digest()


def _columns(topk: Array, rows: list[int]) -> int:
    """Experts of a token: columns up to the last that is not empty throughout."""
    used = np.flatnonzero(np.logical_or.reduce([(topk[row] >= 0).any(axis=0) for row in rows]))
    return int(used[-1]) + 1 if used.size else 0


def _logical(
    found: _Pass, rows: list[int], top_k: int | None = None, *, tokens: int | None = None
) -> NDArray[np.int16]:
    """Experts of each token, or of the first ones, (tokens, layers, top_k), -1 = none."""
    assert found.topk is not None
    chosen = found.topk[:, :tokens, :top_k]
    ids = np.full((chosen.shape[1], len(rows), top_k or chosen.shape[2]), -1, np.int16)
    for at, row in enumerate(rows):
        expert_in = np.append(found.experts[row], -1).astype(np.int16)  # the last for slot -1
        ids[:, at, : chosen.shape[2]] = expert_in[chosen[row]]
    return ids


def _origins(passes: list[_Pass]) -> tuple[Array, Array, Array]:
    """Step, rank and sequence of each token; sequences are the requests of each prefill pass."""
    tokens = [found.num_tokens for found in passes]
    step = np.repeat([found.step for found in passes], tokens)
    rank = np.repeat([found.rank for found in passes], tokens)
    requests = [length for found in passes for length in (found.lengths or [found.num_tokens])]
    return step, rank, np.repeat(np.arange(len(requests)), requests)
