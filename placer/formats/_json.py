"""JSON documents of a file, one in all or one a line, and the responses of serving stacks among them."""

from __future__ import annotations

import base64
import binascii
import json
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.formats._capture import Request

Array = NDArray[Any]

_LOOKED_AT = 1 << 26  # bytes; a response may hold long texts before its ids
_VALUE = re.compile(rb'"(?:prompt_)?routed_experts"\s*:\s*(\[|"[A-Za-z0-9+/]{1,8})')
_NPY = b'"k05VTVBZ'  # how base64 of a .npy begins


def documents(path: Path) -> Iterator[tuple[str, Any]]:
    """The documents of a file, each with the place where it is; of many lines only one is held at a time.

    Raises
    ------
    InvalidInput
        When the file cannot be read or a document is no JSON.
    """
    number, begun = 0, False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)
                except ValueError:
                    if begun:
                        raise
                    file.seek(0)
                    number = 0
                    yield str(path), json.loads(file.read())  # one document over several lines
                    return
                begun = True
                yield f"{path}: line {number}", document
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        at = f"{path}: line {number}" if number else f"{path}"
        raise InvalidInput(f"{at}: not JSON: {_line(error)}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None


def holds_routed_experts(path: Path, *, npy: bool) -> bool:
    """Whether a file is JSON with ids under ``routed_experts``, in ``.npy`` layout (or plain lists) or raw."""
    try:
        with path.open("rb") as file:
            if file.read(64).lstrip()[:1] not in (b"{", b"["):
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _VALUE.search(data, 0, _LOOKED_AT)
                return found is not None and (found[1] in (b"[", _NPY)) == npy
    except (OSError, ValueError):
        return False


def requests(path: Path, decode: Callable[[Any, str | None], Array]) -> Iterator[Request]:
    """Every captured request in a file of responses, wherever they stand in its documents.

    Parameters
    ----------
    path
        A JSON file of one response, a list of them or one a line, wrapped or not.
    decode
        Makes ids ``(tokens, layers, k)`` of a value and the model's name.

    Raises
    ------
    InvalidInput
        When the file or a value in it is damaged.
    """
    for where, document in documents(path):
        model: str | None = None
        prompt: Any = None
        for node in _objects(document):
            if isinstance(node.get("model"), str) and ("choices" in node or "meta_info" in node):
                model = node["model"]
            # Releases of vLLM around 0.21 tell the prompt's ids apart; they belong before those of the first choice.
            for key in ("prompt_routed_experts", "routed_experts"):
                if node.get(key) is None:
                    continue
                try:
                    ids = decode(node[key], model)
                except InvalidInput as error:
                    raise InvalidInput(f"{where}: {key}: {error}") from None
                if key == "prompt_routed_experts":
                    if prompt is not None:
                        yield Request(ids=prompt, where=where, model=model)
                    prompt = ids
                    continue
                yield Request(ids=_after(prompt, ids, where), where=where, model=model)
                prompt = None
        if prompt is not None:
            yield Request(ids=prompt, where=where, model=model)


def raw(value: Any) -> bytes:
    """The bytes that a base64 string stands for.

    Raises
    ------
    InvalidInput
        When it is none.

    Examples
    --------
    >>> raw("AQI=")
    b'\\x01\\x02'
    """
    if not isinstance(value, str):
        raise InvalidInput(f"found {type(value).__name__}, expected a base64 string")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"not base64, or cut off: {error}") from None


def _after(prompt: Array | None, ids: Array, where: str) -> Array:
    if prompt is None:
        return ids
    if prompt.ndim != 3 or prompt.shape[1:] != ids.shape[1:]:
        raise InvalidInput(
            f"{where}: prompt_routed_experts of shape {prompt.shape}, routed_experts of {ids.shape}"
        )
    return np.concatenate([prompt, ids])


def _objects(document: Any) -> Iterator[dict[str, Any]]:
    """The objects in a document, each before those within it, in order."""
    pending = [document]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            inner = [value for key, value in node.items() if not key.endswith("routed_experts")]
        else:
            inner = node if isinstance(node, list) else []
        pending.extend(value for value in reversed(inner) if isinstance(value, dict | list))


def _line(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
