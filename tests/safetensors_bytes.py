"""Safetensors files as bytes, put together by hand: what the reader and the writer are judged by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

TYPES = {"int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}


def safetensors(tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """A file of arrays, or of (dtype, shape, bytes) where numpy has no such type."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            value = (TYPES[value.dtype.name], value.shape, value.tobytes())
        dtype, shape, content = value
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return framed(json.dumps(header).encode(), data)


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data
