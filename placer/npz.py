"""The .npz container: arrays read without ever unpickling, mapped where they are stored as they are."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput

Array = NDArray[Any]

_CHUNK = 1 << 22  # bytes checked in one go


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
