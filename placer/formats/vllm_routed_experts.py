"""vLLM's routed_experts in responses (JSON, base64 text): tokens.

A server started with ``--enable-return-routed-experts`` adds ``routed_experts`` to each choice of its chat, completions
and token-in-token-out responses: base64 of a ``.npy`` file with the logical experts ``(tokens - 1, hidden layers, k)``
of prompt and generated tokens. The last token has none. Layers without a router are 0; what tells them from routed ones
is in `placer.formats._hidden_layers`. Releases around 0.21 tell the prompt's ids apart, as ``prompt_routed_experts`` of
the response, and may return lists instead of base64. What ``CompletionOutput.routed_experts`` holds in Python is read
as format ``npy`` once ``numpy.save`` has written it.

A file holds one response, a list of them or one a line, bare or within other objects (the output of a batch), or
nothing but base64, one request a line. Every choice is a sequence; a prompt that several choices share is counted with
each. The ids say neither engine step nor rank.

Read in vLLM 0.33.0; vllm-project/vllm pull requests 28284 and 38939.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.formats import Hints, _capture, _json, _npy
from placer.trace import Trace

_NPY_IN_BASE64 = b"k05VTVBZ"


def sniff(path: Path) -> bool:
    """Whether a file holds ``routed_experts`` in ``.npy`` layout, as JSON or bare."""
    return _is_text(path) or _json.holds_routed_experts(path, npy=True)


def read(paths: Sequence[Path], hints: Hints) -> Trace:
    """The trace of all requests in some files, in order.

    Raises
    ------
    InvalidInput
        When a file is damaged, requests disagree, or the number of experts is not known.
    """
    found = (request for path in paths for request in _requests(path))
    return _capture.trace(found, hints, source="vLLM routed_experts", name=paths[0].stem)


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(_NPY_IN_BASE64)
    except OSError:
        return False


def _requests(path: Path) -> Iterator[_capture.Request]:
    if not _is_text(path):
        yield from _json.requests(path, _decoded)
        return
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}: line {number}"
                    try:
                        ids = _decoded(line.strip().decode("ascii", "replace"))
                    except InvalidInput as error:
                        raise InvalidInput(f"{where}: {error}") from None
                    yield _capture.Request(ids=ids, where=where)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None


def _decoded(value: Any, model: str | None = None) -> NDArray[Any]:
    if isinstance(value, list):
        try:
            ids = np.array(value)
        except ValueError as error:
            raise InvalidInput(f"lists of unequal lengths: {' '.join(str(error).split())}") from None
        # Among integers numpy takes true and false for 1 and 0.
        if ids.ndim == 3 and any(bool in map(type, row) for rows in value for row in rows):
            raise InvalidInput("found true or false, expected integers")
        return ids if ids.size else np.empty((0, 1, 1), np.uint8)
    return _npy.from_bytes(_json.raw(value))
