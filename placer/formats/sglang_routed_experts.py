"""SGLang's routed_experts in responses (JSON): tokens.

A server started with ``--enable-return-routed-experts`` answers ``return_routed_experts: true`` with ``routed_experts``
in ``sgl_ext`` of each choice (OpenAI-compatible) or in ``meta_info`` (native): base64 of raw little-endian int32, the
logical experts ``[tokens - 1, hidden layers, k]`` of prompt and generated tokens. The string does not say its shape:
hidden layers and k come from a known model, or from ``--num-hidden-layers`` and ``--top-k``. Layers without a router
are 0; what tells them from routed ones is in `placer.formats._hidden_layers`.

A file holds one response, a list of them or one a line, bare or within other objects. Every request is a sequence.

Read in SGLang 0.5.23; sgl-project/sglang pull requests 12162 and 17434.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.formats import Hints, _capture, _json
from placer.model import Model
from placer.trace import Trace


def sniff(path: Path) -> bool:
    """Whether a file is JSON with raw ``routed_experts``."""
    return _json.holds_routed_experts(path, npy=False)


def read(paths: Sequence[Path], hints: Hints) -> Trace:
    """The trace of all requests in some files, in order.

    Raises
    ------
    InvalidInput
        When a file is damaged, requests disagree, or layers, k or the number of experts are not known.
    """

    def decoded(value: Any, model: str | None) -> NDArray[Any]:
        known = Model.for_trace_name(hints.model or model, hints.num_experts)
        layers, top_k = hints.num_hidden_layers or known.num_layers, hints.top_k or known.top_k
        if layers is None or top_k is None:
            raise InvalidInput(
                "raw ids do not say their shape; --num-hidden-layers and --top-k do, or --model names a known one"
            )
        data = _json.raw(value)
        if len(data) % (4 * layers * top_k):
            raise InvalidInput(
                f"found {len(data)} bytes, expected a multiple of {4 * layers * top_k}: int32 of {layers} hidden "
                f"layers and top-{top_k} (--num-hidden-layers, --top-k)"
            )
        return np.frombuffer(data, "<i4").reshape(-1, layers, top_k)

    found = (request for path in paths for request in _json.requests(path, decoded))
    return _capture.trace(found, hints, source="SGLang routed_experts", name=paths[0].stem)
