"""Safetensors files, read and rewritten with neither torch nor the safetensors package.

A file is eight bytes, the header's length as a little-endian integer; the header, a JSON object that gives every
tensor its type, its shape and its place; and the tensors' bytes, one after the other, without a gap
(https://huggingface.co/docs/safetensors, section "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import Repr
from reprlib import repr as short
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput

#: Bits of one element.
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_NUMPY = {
    "BOOL": "?",
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "UI" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    "C64": "<c8",
}

_LARGEST_HEADER = 100_000_000  # bytes, as in the format's own library
_MOST_AXES = 32  # numpy's limit
_QUOTES = Repr()
_QUOTES.maxstring = 200
_CHUNK = 1 << 24  # bytes held in memory at a time


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file.

    Parameters
    ----------
    dtype : str
        The format's name of the element type, a key of `BITS`.
    shape : tuple of int
    start, stop : int
        Offsets in the file of the first byte, and of the one behind the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start

    def row(self, index: int) -> tuple[int, int]:
        """Offsets in the file of the entries at one index of the first axis."""
        size = self.nbytes // self.shape[0]
        return self.start + index * size, self.start + (index + 1) * size


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file, opened: what it holds is known and checked, nothing of it is in memory yet.

    Parameters
    ----------
    path : Path
    tensors : dict of str to Tensor
        In the order of their bytes.
    metadata : dict of str to str
        What the writer of the file noted.
    data_start : int
        Offset of the first tensor's bytes: the length of all that stands before.

    Examples
    --------
    >>> import tempfile
    >>> header = b'{"load":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}}'
    >>> path = Path(tempfile.mkdtemp()) / "rank0.safetensors"
    >>> _ = path.write_bytes(len(header).to_bytes(8, "little") + header + np.arange(4, dtype="<i4").tobytes())
    >>> shard = Shard.open(path)
    >>> shard.tensors["load"].shape, shard.array("load").tolist()
    ((2, 2), [[0, 1], [2, 3]])
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    data_start: int

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Shard:
        """Read and check the header of a file.

        Raises
        ------
        InvalidInput
            When the file cannot be read, is cut off, or its header is not one: too long, not JSON, a tensor twice, of
            an unknown type, over another's bytes or over none's.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                    raise InvalidInput(
                        f"a header of {length:,} bytes in a file of {size:,}, expected safetensors"
                    )
                tensors, metadata = _parsed(file.read(length), 8 + length, size)
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from None
        return cls(path=path, tensors=tensors, metadata=metadata, data_start=8 + length)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InvalidInput(f"{self.path}: no tensor {name!r} among its {len(self.tensors)}")
        return self.tensors[name]

    def array(self, name: str) -> NDArray[Any]:
        """One tensor, read-only and mapped from the file.

        Returns
        -------
        ndarray
            Of the tensor's shape where numpy knows its type; else its bytes as uint8, one row for each index of its
            first axis, or flat for fewer than two axes.

        Raises
        ------
        InvalidInput
            When there is no such tensor, or its rows are no whole bytes.
        """
        tensor = self[name]
        dtype = np.dtype(_NUMPY.get(tensor.dtype, "u1"))
        shape = tensor.shape
        if tensor.dtype not in _NUMPY:
            rows = shape[0] if len(shape) > 1 else 1
            if rows and tensor.nbytes % rows:
                raise InvalidInput(f"{self.path}: {name}: {rows} rows of {tensor.dtype} are no whole bytes")
            shape = (rows, tensor.nbytes // rows if rows else 0) if len(shape) > 1 else (tensor.nbytes,)
        if not tensor.nbytes:
            array: NDArray[Any] = np.empty(shape, dtype)
        else:
            try:
                flat = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.nbytes,))
            except (OSError, ValueError) as error:
                raise InvalidInput(f"{self.path}: cannot be read: {error}") from None
            # Kernels want elements on their natural boundary; a copy where the file offers none.
            array = np.require(flat.view(dtype).reshape(shape), requirements=["A"])
        array.setflags(write=False)
        return array

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from one offset in the file to another, a few megabytes at a time.

        Raises
        ------
        InvalidInput
            When the file has become shorter than it was, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                while start < stop:
                    chunk = file.read(min(_CHUNK, stop - start))
                    if not chunk:
                        raise InvalidInput(f"{self.path}: ends at byte {start:,}, expected {stop:,}")
                    start += len(chunk)
                    yield chunk
        except OSError as error:
            raise InvalidInput(f"{self.path}: cannot be read: {error.strerror}") from None


def rewrite(file: IO[bytes], like: Shard, data: Callable[[str], Iterable[bytes]]) -> None:
    """Write a shard with the header of another, byte for byte, and other bytes in its tensors.

    Parameters
    ----------
    file : binary file
        Written from where it stands, in order.
    like : Shard
        Whose header to take.
    data : callable
        The bytes of a tensor by its name, in pieces; called once for each, in the order of the file.

    Raises
    ------
    InvalidInput
        When a tensor gets more or fewer bytes than it had.
    """
    for chunk in like.chunks(0, like.data_start):
        file.write(chunk)
    for name, tensor in like.tensors.items():
        written = 0
        for chunk in data(name):
            written += file.write(chunk)
        if written != tensor.nbytes:
            raise InvalidInput(f"{like.path}: {name}: {written:,} bytes for it, expected {tensor.nbytes:,}")


def quoted(name: str) -> str:
    """A name for a message: in one line, whole unless it is absurdly long."""
    return _QUOTES.repr(name)


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object in which no key stands twice.

    Raises
    ------
    InvalidInput
        When it is anything else.

    Examples
    --------
    >>> parse_object(b'{"weight": 1}')
    {'weight': 1}
    """
    try:
        document = json.loads(text.decode(), object_pairs_hook=_unique)
    except InvalidInput:
        raise
    except RecursionError:
        raise InvalidInput("JSON nested too deeply") from None
    except ValueError as error:
        raise InvalidInput(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidInput(f"found {short(document)}, expected a JSON object")
    return document


def _parsed(header: bytes, start: int, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    if header[:1] != b"{":
        raise InvalidInput(f"header: found {short(header[:20])}, expected a JSON object")
    document = parse_object(header)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidInput(f"__metadata__: found {short(metadata)}, expected an object of strings")
    tensors = {name: _tensor(name, entry, start) for name, entry in document.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = start
    for name, tensor in ordered.items():
        if tensor.start != end:
            raise InvalidInput(
                f"{quoted(name)}: data_offsets begin at {tensor.start - start:,}, expected {end - start:,}"
            )
        end = tensor.stop
    if end != size:
        raise InvalidInput(f"tensors end at byte {end:,}, but the file has {size:,}: cut off or damaged")
    return ordered, metadata


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InvalidInput(f"{quoted(name)}: found {short(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InvalidInput(f"{quoted(name)}: dtype: found {short(dtype)}, expected one of {', '.join(BITS)}")
    if not _is_counts(shape) or len(shape) > _MOST_AXES:
        raise InvalidInput(
            f"{quoted(name)}: shape: found {short(shape)}, expected up to {_MOST_AXES} extents"
        )
    if not _is_counts(offsets) or len(offsets) != 2:
        raise InvalidInput(f"{quoted(name)}: data_offsets: found {short(offsets)}, expected two offsets")
    bits = BITS[dtype] * prod(shape)
    if bits != 8 * (offsets[1] - offsets[0]):
        raise InvalidInput(
            f"{quoted(name)}: {dtype} {short(shape)} takes {short(bits / 8 if bits % 8 else bits // 8)} bytes, "
            f"data_offsets span {offsets[1] - offsets[0]:,}"
        )
    return Tensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_counts(value: Any) -> bool:
    """Whether a value is a list of integers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidInput(f"key {quoted(twice)} stands twice in one object")
    return found
