"""Files of ``torch.save``, read without torch and without running anything that they hold.

Such a file is a zip: ``<stem>/data.pkl`` is a pickle of plain data and tensors, ``<stem>/data/<key>`` holds the bytes
of one storage, ``<stem>/byteorder`` says how they are ordered. A tensor is a view of a storage.

Reference: PyTorch, "Serialization semantics", https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from reprlib import repr as short
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from placer import plainpickle
from placer.errors import InvalidInput

Array = NDArray[Any]

SMALL, VIEWS = 1 << 24, 16  # bytes that any file may unfold to; else so many times its size

_CHUNK = 1 << 22  # bytes checked in one go
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # how a file of torch before 1.6 begins

# Types of storages, and of the tensors whose storages have none, as numpy names them.
_STORAGES = {
    "torch.BFloat16Storage": "bfloat16",  # which numpy has not: it is widened after reading
    "torch.BoolStorage": "?",
    "torch.ByteStorage": "u1",
    "torch.CharStorage": "i1",
    "torch.DoubleStorage": "f8",
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.IntStorage": "i4",
    "torch.LongStorage": "i8",
    "torch.ShortStorage": "i2",
}
_UNTYPED = "torch.storage.UntypedStorage"
_DTYPES = {"torch.uint16": "u2", "torch.uint32": "u4", "torch.uint64": "u8"}


def load(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote, as plain data.

    Tensors become read-only numpy arrays, mapped from the file where they are stored as numpy reads them; bfloat16
    becomes float32. Where a tensor lived (a CUDA device) does not matter.

    Parameters
    ----------
    path
        A file of torch 1.6 or newer.

    Returns
    -------
    dict, list, tuple, str, int, float, bool, None or numpy.ndarray
        Containers hold nothing else.

    Raises
    ------
    InvalidInput
        When the file is damaged or of an older format, holds anything but plain data and dense tensors, or would take
        more memory than its size explains.

    Examples
    --------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "tiny.pt")
    >>> with zipfile.ZipFile(path, "w") as archive:
    ...     archive.writestr("tiny/data.pkl", b"\\x80\\x02}X\\x04\\x00\\x00\\x00rankK\\x03s.")
    >>> load(path)
    {'rank': 3}
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _File(path, archive, _stem(archive)).value()
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        if _begins(path, len(_LEGACY)) == _LEGACY:
            raise InvalidInput(
                f"{path}: the format of torch before 1.6; load it with torch and save it again with torch.save"
            ) from None
        raise InvalidInput(f"{path}: not a torch.save file, or a truncated one: {error}") from None


def head(path: str | os.PathLike[str], size: int = 4096) -> bytes:
    """The first bytes of a file's pickle, to tell by the names in it what it may hold; empty for any other file.

    Examples
    --------
    >>> head(__file__)
    b''
    """
    try:
        if _begins(path, 4) != b"PK\3\4":
            return b""
        with zipfile.ZipFile(path) as archive, archive.open(f"{_stem(archive)}/data.pkl") as stream:
            return stream.read(size)
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, struct.error, zlib.error):
        return b""


def _begins(path: str | os.PathLike[str], size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _stem(archive: zipfile.ZipFile) -> str:
    found = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise InvalidInput(f"not a torch.save file: found {len(found)} members STEM/data.pkl, expected one")
    return found[0].removesuffix("/data.pkl")


@dataclass(frozen=True)
class _Storage:
    """A storage that the pickle refers to."""

    type: str
    key: str
    numel: int


@dataclass
class _File:
    """The members of one file, and how many bytes of them have been taken."""

    path: str | os.PathLike[str]
    archive: zipfile.ZipFile
    stem: str
    taken: int = 0
    storages: dict[str, tuple[str, Array]] = field(default_factory=dict)

    def value(self) -> Any:
        info = self._member("data.pkl")
        if info.file_size > plainpickle.MAX_BYTES:
            raise InvalidInput(
                f"data.pkl: found {info.file_size} bytes, expected at most {plainpickle.MAX_BYTES}"
            )
        names: dict[str, Callable[..., Any] | None] = {
            **dict.fromkeys((*_STORAGES, *_DTYPES, _UNTYPED)),
            "collections.OrderedDict": _empty,
            "torch.Size": lambda size: size,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_tensor_v2": lambda *given: self._tensor(given[:4]),
            "torch._utils._rebuild_tensor_v3": lambda *given: self._tensor(given[:4], given[6]),
        }
        try:
            return plainpickle.read(
                self.archive.read(info), names=names, persistent=_storage, most_bytes=self._most_bytes
            )
        except InvalidInput as error:
            raise InvalidInput(f"data.pkl: {error}") from None

    @property
    def _most_bytes(self) -> int:
        """What the tensors may hold: views of one storage are common, thousands of them are not."""
        return max(SMALL, VIEWS * os.path.getsize(self.path))

    def _member(self, name: str) -> zipfile.ZipInfo:
        """A member as it must be: stored, not encrypted, and all of them together no longer than the file."""
        try:
            info = self.archive.getinfo(f"{self.stem}/{name}")
        except KeyError:
            raise InvalidInput(f"no member {name}") from None
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED:
            raise InvalidInput(f"{name}: encrypted or compressed; torch.save stores members as they are")
        self.taken += info.file_size
        if self.taken > os.path.getsize(self.path):
            raise InvalidInput(f"{name}: members hold more bytes than the file")
        return info

    @cached_property
    def _order(self) -> Literal["<", ">"]:
        """Byte order as numpy writes it; files of torch before 2.1 do not say and are little-endian."""
        if f"{self.stem}/byteorder" not in self.archive.namelist():
            return "<"
        info = self._member("byteorder")
        word = self.archive.read(info) if info.file_size <= 16 else b""
        if word not in (b"little", b"big"):
            raise InvalidInput(f"byteorder: found {short(word)}, expected little or big")
        return "<" if word == b"little" else ">"

    def _tensor(self, given: tuple[Any, ...], dtype: Any = None) -> Array:
        """A view of a storage, checked to lie within it; given are storage, offset, size and stride."""
        storage, offset, size, stride = given
        if not isinstance(storage, _Storage) or type(size) is not tuple or type(stride) is not tuple:
            raise InvalidInput("found a tensor without storage, size or stride")
        name = storage.type if dtype is None else getattr(dtype, "dotted", "no type")
        kind = (_STORAGES if dtype is None else _DTYPES).get(name)
        if kind is None or (dtype is not None and storage.type != _UNTYPED):
            raise InvalidInput(f"found a tensor of {name}, which numpy has not")
        counts = (offset, *size, *stride)
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts) or len(size) != len(stride):
            raise InvalidInput(
                f"found a tensor from {offset} of shape {short(size)}, strides {short(stride)}"
            )
        values = self._values(storage, kind)
        number = math.prod(size)
        if number == 0:
            return np.empty(size, values.dtype)
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        if last >= len(values) or number > len(values):
            raise InvalidInput(
                f"data/{storage.key}: a tensor of shape {short(size)} and strides {short(stride)} from {offset} on "
                f"leaves its storage of {len(values)} values, or repeats it"
            )
        steps = tuple(step * values.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)

    def _values(self, storage: _Storage, kind: str) -> Array:
        """The values of a storage, one-dimensional; each storage has one kind."""
        if storage.key not in self.storages:
            self.storages[storage.key] = kind, self._read(storage, kind)
        known, values = self.storages[storage.key]
        if known != kind:
            raise InvalidInput(f"data/{storage.key}: found both {known} and {kind}, expected one dtype")
        return values

    def _read(self, storage: _Storage, kind: str) -> Array:
        where = f"data/{storage.key}"
        info = self._member(where)
        dtype = np.dtype("u2" if kind == "bfloat16" else kind).newbyteorder(self._order)
        number, rest = divmod(info.file_size, dtype.itemsize)
        if rest or storage.numel != (info.file_size if storage.type == _UNTYPED else number):
            raise InvalidInput(
                f"{where}: found {info.file_size} bytes, expected {storage.numel} values of {kind}"
            )
        with self.archive.open(info) as stream:
            while stream.read(_CHUNK):  # to the end, where zipfile compares the checksum
                pass
        if number == 0:
            return np.empty(0, "f4" if kind == "bfloat16" else kind)
        values: Array = np.memmap(self.path, dtype, "r", self._offset(info), (number,))
        if kind == "bfloat16":  # the upper half of a float32
            return (values.astype("u4") << np.uint32(16)).view("f4")
        if kind == "?" and values.view("u1").max() > 1:
            raise InvalidInput(f"{where}: found a boolean that is neither 0 nor 1")
        return np.require(values, dtype.newbyteorder("="), ["A"])

    def _offset(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: behind its local header, whose last two lengths vary (APPNOTE 4.3.7)."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        return info.header_offset + 30 + int(name) + int(extra)


def _empty() -> dict[Any, Any]:
    """An ordered dict as torch writes it: its items follow, where keys are checked."""
    return {}


def _storage(found: Any) -> _Storage:
    """What a persistent id refers to: ``("storage", type, key, device, number of elements)``."""
    if type(found) is not tuple or len(found) != 5 or type(found[0]) is not str or found[0] != "storage":
        raise InvalidInput("found a reference to something other than a storage")
    _, name, key, _, numel = found
    if (
        not isinstance(name, plainpickle.Name)
        or type(key) is not str
        or not (key.isascii() and key.isdigit())
    ):
        raise InvalidInput("found a storage without type or key")
    if len(key) > 20 or type(numel) is not int or numel < 0:
        raise InvalidInput("found a storage with an absurd key or number of elements")
    return _Storage(name.dotted, key, numel)
