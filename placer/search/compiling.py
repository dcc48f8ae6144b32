"""The one decorator of all kernels: compiled, cached on disk where there is a place for it, free of the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any] | None = None, *, fastmath: bool = False) -> Any:
    """Compile with numba; without a writable cache folder, compile anew in every process."""
    if function is None:
        return lambda decorated: kernel(decorated, fastmath=fastmath)
    try:
        return njit(cache=True, nogil=True, fastmath=fastmath)(function)
    except RuntimeError:  # numba found no folder to cache in
        return njit(nogil=True, fastmath=fastmath)(function)
