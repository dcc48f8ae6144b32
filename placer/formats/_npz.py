"""Arrays of an ``.npz`` by name, as several formats want them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.npz import read_member


def names(path: Path) -> list[str]:
    """Names of the arrays in a file, in its order; none where it is no ``.npz``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error):
        return []


def arrays(path: Path, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Some arrays of a file; mapped where they are stored as they are.

    Raises
    ------
    InvalidInput
        When there is no such file or array, or it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            held = set(archive.namelist())
            found: dict[str, NDArray[Any]] = {}
            for key in keys:
                if f"{key}.npy" not in held:
                    raise InvalidInput(f"no array {key}")
                found[key] = read_member(archive, path, key)
            return found
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InvalidInput(f"{path}: not an .npz, or a truncated one: {error}") from None
