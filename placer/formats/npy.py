"""Arrays of chosen experts (tokens, layers, k) (.npy): tokens.

Each file is one sequence: tokens in order, logical ids, -1 for no expert. The layers may be the MoE layers alone or, as
in what vLLM's ``CompletionOutput.routed_experts`` holds, all hidden ones: a layer that repeats an expert in every row
is dense and left out (see `placer.formats._hidden_layers`). ``--layer-ids`` switches that off, and names the layers.
Two axes ``(tokens, layers)`` are read as k = 1 when the format is named (ExFlow's traces, arXiv:2401.08383).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from placer.formats import Hints, _capture, _npy
from placer.trace import Trace


def sniff(path: Path) -> bool:
    """Whether a file is a ``.npy`` of integers ``(tokens, layers, k)`` that can be chosen experts."""
    return _npy.looks_routed(path)


def read(paths: Sequence[Path], hints: Hints) -> Trace:
    """The trace of some files, each of them a sequence; a single large one is mapped, not read.

    Raises
    ------
    InvalidInput
        When a file is damaged, files disagree, or the number of experts is not known.
    """
    return _capture.trace(map(_request, paths), hints, source="npy", name=paths[0].stem)


def _request(path: Path) -> _capture.Request:
    ids = _npy.from_file(path)
    return _capture.Request(ids=ids[:, :, None] if ids.ndim == 2 else ids, where=str(path))
