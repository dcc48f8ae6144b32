"""The .npz container: arrays read without ever unpickling, mapped where they are stored as they are."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput

Array = NDArray[Any]

_CHUNK = 1 << 22  # bytes checked in one go
_SAID = 120  # characters of an error of zipfile, which may quote a name of any length


def names(path: str | os.PathLike[str]) -> list[str]:
    """Names of the arrays in a file, in its order; none where it is no .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error):
        return []


def read_members(
    path: str | os.PathLike[str],
    required: Sequence[str],
    optional: Iterable[str] = (),
    *,
    what: str = "an .npz file",
    largest: float = math.inf,
) -> dict[str, Array]:
    """Arrays of a file by name, the optional ones as far as it holds them.

    Parameters
    ----------
    path
    required, optional
        Names of arrays.
    what
        What the file should be, for errors.
    largest
        Bytes that one array may have.

    Raises
    ------
    InvalidInput
        When there is no such file or array, it is damaged, or an array is too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            held = set(archive.namelist())
            for name in required:
                if f"{name}.npy" not in held:
                    raise InvalidInput(f"no array {name}; expected {', '.join(required)}")
            wanted = [name for name in (*required, *optional) if f"{name}.npy" in held]
            for name in wanted:
                if (size := archive.getinfo(f"{name}.npy").file_size) > largest:
                    raise InvalidInput(f"{name}: found an array of {size} bytes, expected at most {largest}")
            return {name: read_member(archive, path, name) for name in wanted}
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InvalidInput(f"{path}: not {what}, or a truncated one: {str(error)[:_SAID]}") from None


def read_member(archive: zipfile.ZipFile, path: str | os.PathLike[str], key: str) -> Array:
    """One array of an .npz, mapped when it is stored as it is; sizes are compared before memory is taken."""
    info = archive.getinfo(f"{key}.npy")
    stored = info.compress_type == zipfile.ZIP_STORED
    if info.flag_bits & 1 or not (stored or info.compress_type == zipfile.ZIP_DEFLATED):
        raise InvalidInput(f"{key}: encrypted or oddly compressed; expected a stored or deflated array")
    try:
        with archive.open(info) as stream:
            shape, fortran, dtype = _read_header(stream)
            if dtype.hasobject:
                raise InvalidInput(f"{key}: found an array of Python objects, which are never unpickled")
            start = stream.tell()
            size = dtype.itemsize
            for extent in shape:
                size *= extent
            held = info.file_size - start
            if size != held:
                raise InvalidInput(f"{key}: header says {size} bytes, {dtype} {shape}; found {held}")
            if stored and size:
                offset = _data_offset(path, info) + start
                array: Array = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
                while stream.read(_CHUNK):  # to the end, where zipfile compares the checksum
                    pass
            else:
                flat = np.frombuffer(stream.read(size), dtype)
                stream.read(1)
                array = flat.reshape(shape, order="F" if fortran else "C")
    except (zlib.error, zipfile.BadZipFile, EOFError, ValueError, TypeError, struct.error) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{key}: damaged array: {' '.join(str(error).split())}") from None
    # Compiled kernels want rows in order and on their natural boundary; a copy where a file offers neither.
    return np.require(array, requirements=["C", "A"])


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):  # 3.0 differs only for field names, which no array here has
        raise ValueError(f".npy version {version}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except Exception:  # numpy evaluates the header as Python, so it fails in any of Python's ways
        raise ValueError("unreadable header") from None
    if any(extent < 0 for extent in shape):
        raise ValueError(f"negative shape {shape}")
    return shape, fortran, dtype


def _data_offset(path: str | os.PathLike[str], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose last two lengths vary (APPNOTE 4.3.7)."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


def write_members(file: IO[bytes], members: dict[str, Array], compressed: bool) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in members.items():
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            if not compressed:
                # An extra field (0xD935: alignment) puts arrays on 64-byte boundaries; zip64 adds 20 bytes.
                pad = -(file.tell() + 30 + len(info.filename) + 20 + 4) % 64
                info.extra = struct.pack("<HH", 0xD935, pad) + bytes(pad)
            with archive.open(info, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array, order="C"), (1, 0), allow_pickle=False)
