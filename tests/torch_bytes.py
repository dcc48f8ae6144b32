"""Files of ``torch.save``, put together by hand from plain data and numpy arrays."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
}


def save(path: Path, value: Any, *, device: str = "cpu", stem: str = "archive") -> Path:
    """Write a file as torch does: arrays become tensors on `device`."""
    storages: list[np.ndarray[Any, Any]] = []
    pickle = b"\x80\x02" + _pickled(value, storages, device) + b"."
    return write(path, pickle, [np.ascontiguousarray(array).tobytes() for array in storages], stem=stem)


def write(
    path: Path,
    pickle: bytes,
    storages: list[bytes] | None = None,
    *,
    stem: str = "archive",
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """The zip around a pickle and its storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{stem}/data.pkl", pickle, compression)
        if byteorder is not None:
            archive.writestr(f"{stem}/byteorder", byteorder)
        for key, content in enumerate(storages or []):
            archive.writestr(f"{stem}/data/{key}", content, compression)
        archive.writestr(f"{stem}/version", b"3\n")
    return path


def tensor(
    storage: str, key: str, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """The instructions that rebuild a tensor, whether or not its storage has what they say."""
    return _rebuilt(storage, key, numel, "cpu", offset, size, stride)


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def _rebuilt(
    storage: str,
    key: str,
    numel: int,
    device: str,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> bytes:
    reference = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(key) + text(device)
    reference += _integer(numel) + b"tQ"
    rest = _integer(offset) + _tuple(size) + _tuple(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + rest + b"tR"


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _integer(value: int) -> bytes:
    content = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def _pickled(value: Any, storages: list[np.ndarray[Any, Any]], device: str) -> bytes:
    if isinstance(value, np.ndarray):
        storages.append(value)
        strides = tuple(int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim))
        name = STORAGES[value.dtype.name]
        return _rebuilt(name, str(len(storages) - 1), value.size, device, 0, value.shape, strides)
    if isinstance(value, dict):
        items = [(_pickled(k, storages, device), _pickled(v, storages, device)) for k, v in value.items()]
        return b"}(" + b"".join(key + item for key, item in items) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_pickled(item, storages, device) for item in value) + b"e"
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, int):
        return _integer(value)
    assert value is None
    return b"N"
