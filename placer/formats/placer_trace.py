"""Trace files of placer itself (.npz), several of which become one.

See `placer.trace` for what is in them and `placer.merging` for how they are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from placer import npz
from placer.errors import InvalidInput
from placer.formats import Hints
from placer.merging import merge
from placer.trace import Trace


def sniff(path: Path) -> bool:
    """Whether a file is an ``.npz`` with ``topk_idx`` and ``meta``."""
    return {"topk_idx", "meta"} <= set(npz.names(path))


def read(paths: Sequence[Path], hints: Hints) -> Trace:
    """The traces of some files as one; hints must agree with them, and name a model where they name none.

    Raises
    ------
    InvalidInput
        When a file is damaged, or one differs from the first or from a hint.
    """
    traces, names = [Trace.load(path) for path in paths], [str(path) for path in paths]
    for trace, name in zip(traces, names, strict=True):
        for key in ("num_experts", "top_k", "layer_ids"):
            hint, found = getattr(hints, key), getattr(trace, key)
            if hint not in (None, found):
                raise InvalidInput(f"{name}: {key} is {found!s:.60}, expected {hint!s:.60}")
    merged = merge(traces, names)
    return merged if hints.model in (None, merged.model) else replace(merged, model=hints.model)
