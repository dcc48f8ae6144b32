"""Arrays in numpy's ``.npy`` layout, from a file or from bytes: nothing is unpickled, nothing is taken on trust.

Reference: numpy, "A simple file format for NumPy arrays",
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.trace import MAX_EXPERTS

Array = NDArray[Any]

MAGIC = b"\x93NUMPY"

_LOOKED_AT = 256  # tokens


def from_file(path: Path) -> Array:
    """The array of a file, mapped into memory.

    Raises
    ------
    InvalidInput
        When the file is damaged, holds objects, or more or fewer bytes than its header says.
    """
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            start, held = file.tell(), file.seek(0, io.SEEK_END) - file.tell()
            _check_size(shape, dtype, file.tell() - start)
        if not held and 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None


def from_bytes(data: bytes) -> Array:
    """The array of a file's bytes, as a view of them.

    Raises
    ------
    InvalidInput
        As `from_file`, without the name of a file.

    Examples
    --------
    >>> file = io.BytesIO()
    >>> np.save(file, np.arange(3))
    >>> from_bytes(file.getvalue()).tolist()
    [0, 1, 2]
    """
    file = io.BytesIO(data)
    shape, fortran, dtype = _header(file)
    _check_size(shape, dtype, len(data) - file.tell())
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def looks_routed(path: Path) -> bool:
    """Whether a file is a ``.npy`` of integers ``(tokens, layers, k)`` that can be chosen experts.

    Loads ``(steps, layers, experts)`` have that shape too. They differ in their rows: loads often hold a value twice,
    which chosen experts never do but in dense layers, all 0; and all layers of a step have the same sum, tokens times
    k, which chosen experts have only by accident.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return False
        array = from_file(path)
    except (InvalidInput, OSError):
        return False
    if array.dtype.kind not in "iu" or array.ndim != 3 or 0 in array.shape or array.shape[2] > MAX_EXPERTS:
        return False
    first = np.asarray(array[:_LOOKED_AT])
    if first.min() < -1 or first.max() >= MAX_EXPERTS:
        return False
    if array.shape[2] == 1:
        return True
    written = first.any(axis=2)
    ordered = np.sort(first, axis=2)
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(axis=2)
    if 2 * (twice & written).sum() >= written.sum():
        return False
    sums = np.ma.array(first.sum(axis=2, dtype=np.int64), mask=~written)
    several = written.sum(axis=1) > 1
    return not several.any() or bool((sums.max(axis=1) != sums.min(axis=1))[several].any())


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):  # 3.0 differs only for field names, which no array here has
            raise ValueError(f"version {version}")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header as Python, so it fails in any of Python's ways
        raise InvalidInput(
            f"not a .npy file, or a damaged one: {' '.join(str(error).split())[:120]}"
        ) from None
    if dtype.hasobject:
        raise InvalidInput("found an array of Python objects, which are never unpickled")
    if any(extent < 0 for extent in shape):
        raise InvalidInput(f"found shape {shape}, expected no negative extent")
    return shape, fortran, dtype


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], held: int) -> None:
    size = math.prod(shape) * dtype.itemsize
    if size != held or max(shape, default=0) >= 2**31 or dtype.itemsize == 0:
        raise InvalidInput(f"header says {size} bytes, {dtype} {shape}; found {held}")
