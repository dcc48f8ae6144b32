"""Counts: how many tokens each expert served, where the tokens themselves were not recorded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.files import write_atomically
from placer.npz import names, read_members, write_members
from placer.trace import MAX_EXPERTS


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Loads of the experts of each layer: enough to balance load, not to cut traffic.

    Checked once, when it is made; the array is kept as a read-only view.

    Parameters
    ----------
    load
        ``(num_layers, num_experts)`` int64: tokens that each expert served. Any whole numbers from 0 are taken.
    num_tokens
        Tokens counted; None where the recording does not say.
    layer_ids
        Index in the model of each layer; 0, 1, ... by default.
    model
        Name of the model, as its publisher writes it.
    num_groups
        Gate groups of consecutive experts.
    source
        Where the loads were recorded.
    name
        What logs call them; the file's stem when they are read from one.

    Raises
    ------
    InvalidInput
        When the array or a value breaks one of the rules above.

    Examples
    --------
    >>> counts = Counts(load=np.array([[3, 0, 5, 0]]), layer_ids=(7,))
    >>> counts.num_layers, counts.num_experts, counts.layer_ids
    (1, 4, (7,))
    """

    load: NDArray[np.int64] = field(repr=False)
    num_tokens: int | None = None
    layer_ids: tuple[int, ...] = ()
    model: str | None = None
    num_groups: int = 1
    source: str | None = None
    name: str = "counts"

    #: Keys of the file's ``meta``.
    META_KEYS: ClassVar[tuple[str, ...]] = ("num_tokens", "layer_ids", "model", "num_groups", "source")

    def __post_init__(self) -> None:
        load = whole_loads(self.load, "load")
        if load.ndim != 2 or load.size == 0:
            raise InvalidInput(f"load: found shape {load.shape}, expected (num_layers, num_experts)")
        if load.shape[1] > MAX_EXPERTS:
            raise InvalidInput(f"load: found {load.shape[1]} experts a layer, expected at most {MAX_EXPERTS}")
        load = load.view()
        load.setflags(write=False)
        object.__setattr__(self, "load", load)
        if self.num_tokens is not None and (not _whole(self.num_tokens) or not 1 <= self.num_tokens < 2**62):
            raise InvalidInput(
                f"num_tokens: found {short(self.num_tokens)}, expected an integer of 1 or more"
            )
        if not _whole(self.num_groups) or self.num_groups < 1 or self.num_experts % self.num_groups:
            raise InvalidInput(
                f"num_groups: found {short(self.num_groups)}, expected a divisor of {self.num_experts} experts"
            )
        for key in ("model", "source"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise InvalidInput(f"{key}: found {short(value)}, expected a string")
        ids = tuple(self.layer_ids) or tuple(range(self.num_layers))
        if (
            not all(_whole(layer) and 0 <= layer < 2**31 for layer in ids)
            or len(set(ids)) < len(ids)
            or len(ids) != self.num_layers
        ):
            raise InvalidInput(
                f"layer_ids: found {short(ids)}, expected {self.num_layers} distinct ids from 0 to 2**31 - 1"
            )
        object.__setattr__(self, "layer_ids", tuple(int(layer) for layer in ids))

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        """Logical experts of each layer."""
        return int(self.load.shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file (``.npz``: ``load`` and ``meta``), whole or not at all; equal counts give equal bytes.

        Raises
        ------
        InvalidInput
            When the file cannot be written.
        """
        meta = {key: getattr(self, key) for key in self.META_KEYS if getattr(self, key) is not None}
        members = {"meta": np.array(json.dumps(meta, ensure_ascii=True)), "load": self.load}
        write_atomically(path, lambda file: write_members(file, members, compressed=True))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Counts:
        """Read a file of counts; nothing in it is ever unpickled, and unknown arrays and keys are ignored.

        Raises
        ------
        InvalidInput
            When there is no such file, it is damaged, or what it holds are no counts.

        Examples
        --------
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tiny.npz"
        >>> Counts(load=np.array([[3, 0, 5, 0]]), model="toy").save(path)
        >>> Counts.open(path)
        Counts(num_tokens=None, layer_ids=(0,), model='toy', num_groups=1, source=None, name='tiny')
        """
        arrays = read_members(path, ("load", "meta"), what="an .npz of counts")
        try:
            meta = _parsed(arrays["meta"])
            known: dict[str, Any] = {key: meta[key] for key in cls.META_KEYS if meta.get(key) is not None}
            return cls(load=arrays["load"], **known, name=Path(path).stem)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from None

    @staticmethod
    def holds(path: str | os.PathLike[str]) -> bool:
        """Whether a file is an .npz with loads and no tokens, told from its list of members."""
        held = names(path)
        return {"load", "meta"} <= {*held} and "topk_idx" not in held


def whole_loads(array: Any, where: str) -> NDArray[np.int64]:
    """Loads as int64, where they are whole numbers from 0 whose sum does not overflow; floats may be whole too.

    Raises
    ------
    InvalidInput
        Naming `where` and the first value that is none.

    Examples
    --------
    >>> whole_loads(np.array([[2.0, 0.0]]), "load").tolist()
    [[2, 0]]
    >>> whole_loads(np.array([[2.5, 0.0]]), "load")
    Traceback (most recent call last):
    placer.errors.InvalidInput: load: found 2.5 at [0, 0], expected whole numbers from 0
    """
    loads = np.asarray(array)
    if loads.dtype.kind not in "iuf":
        raise InvalidInput(f"{where}: found dtype {loads.dtype}, expected whole numbers from 0")
    with np.errstate(invalid="ignore"):
        wrong = ~(loads >= 0)
        if loads.dtype.kind == "f":
            wrong |= (loads != np.floor(loads)) | np.isinf(loads)
    if wrong.any():
        at = [int(i) for i in np.argwhere(wrong)[0]]
        raise InvalidInput(f"{where}: found {loads[tuple(at)]} at {at}, expected whole numbers from 0")
    if float(loads.sum(dtype=np.float64)) >= 2.0**62:
        raise InvalidInput(
            f"{where}: found a sum of {loads.sum(dtype=np.float64):.3g}, expected less than 2**62"
        )
    return np.asarray(loads, np.int64)


def _parsed(array: NDArray[Any]) -> dict[str, Any]:
    """The ``meta`` of a file."""
    if array.dtype.kind not in "US" or array.size != 1:
        raise InvalidInput(f"meta: found {array.dtype} of shape {array.shape}, expected one JSON string")
    try:
        text = array.reshape(-1)[0]
        meta = json.loads(text.decode() if isinstance(text, bytes) else str(text))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"meta: not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise InvalidInput(f"meta: found {short(meta)}, expected a JSON object")
    if not isinstance(meta.get("layer_ids", []), list):
        raise InvalidInput(f"layer_ids: found {short(meta['layer_ids'])}, expected a list of integers")
    return meta


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
