"""Routing traces: which experts every token chose in every layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from placer import batches
from placer.errors import InvalidInput
from placer.files import write_atomically
from placer.npz import names, read_members, write_members

Array = NDArray[Any]

#: Far above any released model; keeps a wrong number in a file from sizing an ``(E, E)`` table.
MAX_EXPERTS = 1 << 12

_CHUNK = 1 << 22  # ids looked at in one go, so that memory stays bounded for mapped traces
_SPLIT_BLOCKS, _BLOCK_TOKENS = 64, 16  # the split of a trace that has no sequences


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """The experts chosen by each token in each layer, and where the tokens come from.

    Checked once, when it is made; arrays are kept as read-only views.

    Parameters
    ----------
    topk_idx
        ``(num_tokens, num_layers, top_k)``, any integer dtype: logical experts in ``[0, num_experts)``,
        distinct within a row. -1 stands for no expert (a dropped choice) and needs a signed dtype.
    num_experts
        Logical experts of each layer.
    topk_weights
        Router weights, same shape as `topk_idx`, floating.
    sequence, source_rank, step, domain
        ``(num_tokens,)`` integers: the document or request of a token, the rank it lives on, the engine
        step it ran in, the subject it is about.
    model
        Name of the model, as its publisher writes it.
    num_groups, topk_groups
        Group-limited gating: groups of consecutive experts, and how many of them a token may use.
    layer_ids
        Index in the model of each layer of the trace; 0, 1, ... by default.
    phase, source, license
        "prefill" or "decode", where the trace was recorded, and its terms.
    name
        What logs call the trace; the file's stem when it is loaded.

    Raises
    ------
    InvalidInput
        When an array or a value breaks one of the rules above.

    Examples
    --------
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]], [[0, 2]]]), num_experts=4)
    >>> trace.num_tokens, trace.num_layers, trace.top_k
    (3, 1, 2)
    """

    topk_idx: Array = field(repr=False)
    num_experts: int
    topk_weights: Array | None = field(default=None, repr=False)
    sequence: Array | None = field(default=None, repr=False)
    source_rank: Array | None = field(default=None, repr=False)
    step: Array | None = field(default=None, repr=False)
    domain: Array | None = field(default=None, repr=False)
    model: str | None = None
    num_groups: int = 1
    topk_groups: int = 1
    layer_ids: tuple[int, ...] = ()
    phase: str | None = None
    source: str | None = None
    license: str | None = None
    name: str = "trace"

    #: Optional arrays with one integer a token, by name.
    TOKEN_ARRAYS: ClassVar[tuple[str, ...]] = ("sequence", "source_rank", "step", "domain")
    #: Keys of the file's ``meta`` besides ``num_experts``.
    META_KEYS: ClassVar[tuple[str, ...]] = (
        "model",
        "num_groups",
        "topk_groups",
        "layer_ids",
        "phase",
        "source",
        "license",
    )

    def __post_init__(self) -> None:
        for key in ("topk_idx", "topk_weights", *self.TOKEN_ARRAYS):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, _read_only(value))
        ids = self.topk_idx
        if ids.dtype.kind not in "iu":
            raise InvalidInput(f"topk_idx: found dtype {ids.dtype}, expected integers")
        if ids.ndim != 3:
            raise InvalidInput(
                f"topk_idx: found shape {ids.shape}, expected (num_tokens, num_layers, top_k)",
            )
        if ids.size == 0:
            raise InvalidInput(f"topk_idx: empty trace, shape {ids.shape}; expected at least one of each")
        _check_count("num_experts", self.num_experts, MAX_EXPERTS)
        if self.top_k > self.num_experts:
            raise InvalidInput(
                f"topk_idx: {self.top_k} experts a token, expected at most num_experts = {self.num_experts}"
            )
        self._check_meta()
        self._check_arrays()
        _check_ids(ids, self.num_experts)

    def _check_meta(self) -> None:
        _check_count("num_groups", self.num_groups, self.num_experts)
        _check_count("topk_groups", self.topk_groups, self.num_groups)
        if self.num_experts % self.num_groups:
            raise InvalidInput(
                f"num_groups: found {self.num_groups}, expected a divisor of num_experts = {self.num_experts}"
            )
        for key in ("model", "phase", "source", "license"):
            value = getattr(self, key)
            if not (value is None or (isinstance(value, str) and _is_text(value))):
                raise InvalidInput(f"{key}: found {_short(value)}, expected a string")
        layer_ids = tuple(self.layer_ids) or tuple(range(self.num_layers))
        if not all(
            isinstance(layer, int | np.integer) and not isinstance(layer, bool) for layer in layer_ids
        ):
            raise InvalidInput(f"layer_ids: found {_short(layer_ids)}, expected integers")
        if len(layer_ids) != self.num_layers:
            raise InvalidInput(
                f"layer_ids: {len(layer_ids)} ids, expected {self.num_layers}, one for each layer of topk_idx"
            )
        if min(layer_ids) < 0 or max(layer_ids) >= 2**31 or len(set(layer_ids)) < len(layer_ids):
            raise InvalidInput(
                f"layer_ids: found {_short(layer_ids)}, expected distinct ids from 0 to 2**31 - 1"
            )
        object.__setattr__(self, "layer_ids", tuple(int(layer) for layer in layer_ids))

    def _check_arrays(self) -> None:
        weights = self.topk_weights
        if weights is not None:
            if weights.dtype.kind != "f":
                raise InvalidInput(f"topk_weights: found dtype {weights.dtype}, expected floats")
            if weights.shape != self.topk_idx.shape:
                raise InvalidInput(
                    f"topk_weights: found shape {weights.shape}, expected {self.topk_idx.shape} as topk_idx"
                )
        for key in self.TOKEN_ARRAYS:
            array = getattr(self, key)
            if array is None:
                continue
            if array.dtype.kind not in "iu":
                raise InvalidInput(f"{key}: found dtype {array.dtype}, expected integers")
            if array.shape != (self.num_tokens,):
                raise InvalidInput(
                    f"{key}: found shape {array.shape}, expected ({self.num_tokens},), one for each token"
                )

    @property
    def num_tokens(self) -> int:
        """Tokens of the trace."""
        return int(self.topk_idx.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers of the trace."""
        return int(self.topk_idx.shape[1])

    @property
    def top_k(self) -> int:
        """Experts a token chooses in one layer."""
        return int(self.topk_idx.shape[2])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of ids, shape and `num_experts`; the same for every integer dtype."""
        digest = hashlib.sha256(f"{self.topk_idx.shape} of {self.num_experts}".encode())
        for _, chunk in _chunks(self.topk_idx):
            digest.update(np.ascontiguousarray(chunk, dtype="<i4").data)
        return digest.hexdigest()

    # -- parts ---------------------------------------------------------------------------------------

    def select(self, tokens: slice | Sequence[int] | Array) -> Trace:
        """The trace of some tokens, in the order given: a slice (no copy), indices or a bool mask.

        Raises
        ------
        InvalidInput
            When no token is left or an index does not exist.

        Examples
        --------
        >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]], [[0, 2]]]), num_experts=4)
        >>> trace.select([2, 0]).topk_idx[:, 0].tolist()
        [[0, 2], [0, 1]]
        """
        keep = _selector(tokens, self.num_tokens, "tokens")
        arrays = {key: getattr(self, key) for key in ("topk_idx", "topk_weights", *self.TOKEN_ARRAYS)}
        return self._part({key: array[keep] for key, array in arrays.items() if array is not None})

    def layers(self, subset: slice | Sequence[int] | Array) -> Trace:
        """The trace of some layers, by position in the trace; `layer_ids` follow.

        Raises
        ------
        InvalidInput
            When no layer is left, one does not exist or one is named twice.

        Examples
        --------
        >>> trace = Trace(topk_idx=np.array([[[0], [1], [2]]]), num_experts=3, layer_ids=(3, 4, 5))
        >>> trace.layers(slice(1, None)).layer_ids
        (4, 5)
        """
        keep = _selector(subset, self.num_layers, "layers")
        layer_ids = tuple(int(layer) for layer in np.array(self.layer_ids, dtype=object)[keep])
        if len(set(layer_ids)) < len(layer_ids):
            raise InvalidInput(f"layers: found {_short(layer_ids)}, expected each layer once")
        changed: dict[str, Any] = {"topk_idx": self.topk_idx[:, keep], "layer_ids": layer_ids}
        if self.topk_weights is not None:
            changed["topk_weights"] = self.topk_weights[:, keep]
        return self._part(changed)

    def _part(self, changed: dict[str, Any]) -> Trace:
        """A trace with some fields changed; not checked again, for a part of a valid trace is valid."""
        part = object.__new__(Trace)
        for item in fields(self):
            value = changed.get(item.name, getattr(self, item.name))
            if isinstance(value, np.ndarray):
                value = _read_only(value)
            object.__setattr__(part, item.name, value)
        return part

    @cached_property
    def split_kind(self) -> str:
        """What `split` keeps whole: "sequence", or "blocks" of tokens where no two sequences are known."""
        if self.sequence is not None and np.any(self.sequence != self.sequence[0]):
            return "sequence"
        return "blocks"

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Trace, Trace]:
        """Two disjoint parts that cover the trace: one to fit a placement on, one held out.

        Whole sequences are taken in the order of `sequence_hash`, so the halves depend neither on the order
        of the tokens nor on the machine; see `split_kind` for traces without sequences.

        Parameters
        ----------
        fraction
            Share of the sequences (or blocks) that goes to the first part, in (0, 1).
        seed
            Another seed gives another split.

        Returns
        -------
        fit, held_out
            Each holds at least one sequence (or block), with its tokens in the order of the trace.

        Raises
        ------
        InvalidInput
            When the fraction is outside (0, 1) or there is only one token.

        Examples
        --------
        >>> ids = np.zeros((6, 1, 1), dtype=np.uint8)
        >>> trace = Trace(topk_idx=ids, num_experts=1, sequence=np.array([7, 7, 8, 8, 9, 9]))
        >>> fit, held_out = trace.split(2 / 3)
        >>> fit.num_tokens, held_out.num_tokens
        (4, 2)
        """
        if not 0 < fraction < 1:
            raise InvalidInput(f"split: found fraction {fraction}, expected more than 0 and less than 1")
        if self.num_tokens == 1:
            raise InvalidInput(f"split: {self.name} has 1 token, expected at least 2 to hold some out")
        units = (
            self.sequence if self.sequence is not None and self.split_kind == "sequence" else self._blocks()
        )
        unique, unit_of_token = np.unique(sequence_hash(units, self.source or "", seed), return_inverse=True)
        count = min(max(round(fraction * unique.size), 1), unique.size - 1)
        first = np.arange(unique.size) < count
        chosen = first[unit_of_token.reshape(-1)]
        return self.select(chosen), self.select(~chosen)

    def rebatch(self, tokens_per_step: int, *, seed: int = 0, phase: str | None = None) -> Trace:
        """The same trace with `step` set anew: its sequences queued in random order, as an engine runs them.

        See `placer.batches.steps` for the two phases; tokens keep their order and nothing else changes.

        Parameters
        ----------
        tokens_per_step
            Tokens in one step over all ranks, at most; the last steps of "decode" run fewer and are kept.
        seed
            Another seed gives another order of the sequences.
        phase
            "prefill" or "decode"; by default "decode" where the trace's own phase begins so, else "prefill".

        Raises
        ------
        InvalidInput
            When the trace has no `sequence`, a step holds no token or the phase is another.

        Examples
        --------
        >>> ids = np.zeros((4, 1, 1), dtype=np.uint8)
        >>> trace = Trace(topk_idx=ids, num_experts=1, sequence=np.array([7, 7, 8, 8]))
        >>> trace.rebatch(2, phase="decode").step.tolist()
        [0, 1, 0, 1]
        """
        return self._part({"step": batches.steps(self, tokens_per_step, seed=seed, phase=phase)})

    def sequence_key(self, seed: int = 0) -> NDArray[np.uint64]:
        """Pseudo-random key of each token's sequence, ``(num_tokens,)``; of its block where none are known.

        Whole sequences with the smallest keys make a sample or a split that depends neither on the order of
        the tokens nor on the machine (see `sequence_hash`), nor on the shard that a sequence is found in.
        """
        units = self._blocks() if self.sequence is None else self.sequence
        return sequence_hash(units, self.source or "", seed)

    def _blocks(self) -> NDArray[np.int64]:
        """Blocks of consecutive tokens that stand for sequences, ``(num_tokens,)``."""
        count = min(_SPLIT_BLOCKS, max(2, self.num_tokens // _BLOCK_TOKENS))
        return np.arange(self.num_tokens) * count // self.num_tokens

    # -- files ---------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, compressed: bool = True) -> None:
        """Write the trace file (``.npz``), whole or not at all; equal traces give equal bytes.

        Parameters
        ----------
        path
            The file; its folder must exist.
        compressed
            False stores the arrays as they are, and `load` maps them instead of reading them.

        Raises
        ------
        InvalidInput
            When the file cannot be written.
        """
        meta = {"num_experts": self.num_experts}
        meta |= {key: getattr(self, key) for key in self.META_KEYS if getattr(self, key) is not None}
        members = {"meta": np.array(json.dumps(meta, ensure_ascii=False))}
        for key in ("topk_idx", "topk_weights", *self.TOKEN_ARRAYS):
            if getattr(self, key) is not None:
                members[key] = getattr(self, key)
        write_atomically(path, lambda file: write_members(file, members, compressed))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace file; nothing in it is ever unpickled, and unknown arrays and keys are ignored.

        Arrays that the file stores uncompressed are mapped into memory, others are read.

        Raises
        ------
        InvalidInput
            When there is no such file, it is damaged, or what it holds is no trace.

        Examples
        --------
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tiny.npz"
        >>> Trace(topk_idx=np.array([[[0, 1]]]), num_experts=2, model="toy").save(path)
        >>> Trace.load(path)
        Trace(num_experts=2, model='toy', ..., name='tiny')
        """
        held = names(path)
        if "topk_idx" not in held and {"load", "meta"} <= {*held}:
            raise InvalidInput(f"{path}: holds loads only (counts); expected a trace with topk_idx")
        optional = ("topk_weights", *cls.TOKEN_ARRAYS)
        arrays: dict[str, Any] = read_members(path, ("topk_idx", "meta"), optional, what="an .npz trace")
        try:
            meta = _parse_meta(arrays.pop("meta"))
            known: dict[str, Any] = {key: meta[key] for key in cls.META_KEYS if meta.get(key) is not None}
            return cls(**arrays, num_experts=meta["num_experts"], **known, name=Path(path).stem)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from None


def sequence_hash(sequence: Array, source: str = "", seed: int = 0) -> NDArray[np.uint64]:
    """A stable pseudo-random key for each sequence; different sequences of one source never collide.

    SplitMix64's finaliser (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195), which is a bijection, on
    the id plus a hash of seed and source.

    Parameters
    ----------
    sequence
        Integer ids, any shape.
    source
        Where the sequences come from, so that equal ids of two sources differ.
    seed
        Another seed gives another order.

    Examples
    --------
    >>> sequence_hash(np.array([0, 1, 2])).argsort().tolist()
    [1, 2, 0]
    """
    start = hashlib.blake2b(f"{seed}\0{source}".encode(), digest_size=8).digest()
    key = sequence.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key += np.uint64(int.from_bytes(start, "little"))
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


# -- checks ------------------------------------------------------------------------------------------


def _read_only(array: Any) -> Array:
    view = np.asarray(array).view()
    if not view.dtype.isnative:
        view = view.astype(view.dtype.newbyteorder("="))
    view.setflags(write=False)
    return view


def _is_text(value: str) -> bool:
    """Whether a string can be written out; JSON may hold halves of characters that cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_count(key: str, value: object, largest: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= largest:
        raise InvalidInput(f"{key}: found {_short(value)}, expected an integer from 1 to {largest}")


def _chunks(ids: Array) -> Iterator[tuple[int, Array]]:
    step = max(1, _CHUNK // (ids.shape[1] * ids.shape[2]))
    for start in range(0, len(ids), step):
        yield start, ids[start : start + step]


def _check_ids(ids: Array, num_experts: int) -> None:
    lowest = 0 if ids.dtype.kind == "u" else -1
    for start, chunk in _chunks(ids):
        if chunk.min() < lowest or chunk.max() >= num_experts:
            token, layer, slot = np.argwhere((chunk < lowest) | (chunk >= num_experts))[0]
            raise InvalidInput(
                f"topk_idx: found expert {chunk[token, layer, slot]} at token {start + token}, "
                f"layer {layer}; expected 0 to {num_experts - 1}" + (" or -1" if lowest else "")
            )
        ordered = np.sort(chunk, axis=-1)
        repeated = ordered[..., 1:] == ordered[..., :-1]
        if lowest:
            repeated &= ordered[..., 1:] >= 0
        if repeated.any():
            token, layer, slot = np.argwhere(repeated)[0]
            raise InvalidInput(
                f"topk_idx: found expert {ordered[token, layer, slot]} twice at token {start + token}, "
                f"layer {layer}; expected distinct experts"
            )


def _selector(chosen: slice | Sequence[int] | Array, count: int, what: str) -> slice | Array:
    """`chosen` as a slice or index array that leaves something and names only what exists."""
    if isinstance(chosen, slice):
        if not range(*chosen.indices(count)):
            raise InvalidInput(f"{what}: none left of {count}")
        return chosen
    index = np.asarray(chosen)
    if index.ndim == 1 and index.dtype == bool and len(index) == count:
        index = np.flatnonzero(index)
    if index.size == 0:
        raise InvalidInput(f"{what}: none left of {count}")
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise InvalidInput(f"{what}: found {_short(chosen)}, expected a slice, indices or {count} booleans")
    if index.min() < -count or index.max() >= count:
        raise InvalidInput(
            f"{what}: found index {index.min() if index.max() < count else index.max()} of {count}"
        )
    return index


def _parse_meta(array: Array) -> dict[str, Any]:
    if array.dtype.kind not in "US" or array.size != 1:
        raise InvalidInput(f"meta: found {array.dtype} of shape {array.shape}, expected one JSON string")
    try:
        text = array.reshape(-1)[0]
        meta = json.loads(text.decode() if isinstance(text, bytes) else str(text))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"meta: not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise InvalidInput(f"meta: found {_short(meta)}, expected a JSON object")
    if "num_experts" not in meta:
        raise InvalidInput("meta: no key num_experts")
    layer_ids = meta.get("layer_ids")
    if layer_ids is not None and not isinstance(layer_ids, list):
        raise InvalidInput(f"meta: layer_ids: found {_short(layer_ids)}, expected a list of integers")
    return meta
