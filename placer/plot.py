"""Plot: a sweep as a picture. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from placer.cliff import Sweep
from placer.errors import InvalidInput
from placer.files import write_atomically

FORMATS = ("pdf", "png", "svg")


def plottable(path: str | os.PathLike[str]) -> str:
    """The format that the name of a picture asks for.

    Raises
    ------
    InvalidInput
        When the name ends otherwise, or matplotlib is not installed.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise InvalidInput(
            f"{path}: found a name that ends in {kind or 'nothing'!r}, expected {', '.join(FORMATS)}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput(
            f"{path}: a plot needs matplotlib, which is not installed: pip install 'placer[plot]'"
        )
    return kind


def plot(sweep: Sweep, path: str | os.PathLike[str]) -> None:
    """Draw traffic and the ratio of all-to-all to compute over the width, one line a routing and method.

    Parameters
    ----------
    sweep : Sweep
    path : path
        The picture; its suffix is the format: pdf, png or svg.

    Raises
    ------
    InvalidInput
        When it cannot be written, or as for `plottable`.
    """
    kind = plottable(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 7.0), layout="constrained")
    traffic, ratio = figure.subplots(2, 1, sharex=True)
    widths = sorted({row.ep for row in sweep.rows})
    for (routing, method), rows in sweep.series().items():
        across = [row.ep for row in rows]
        (line,) = traffic.plot(
            across, [row.inter_server_gb for row in rows], marker="o", label=f"{routing}, {method}"
        )
        inside = [row.intra_server_gb for row in rows]
        traffic.plot(across, inside, linestyle=":", marker=".", color=line.get_color())
        known = [row for row in rows if row.a2a_over_compute is not None]
        ratio.plot(
            [row.ep for row in known],
            [row.a2a_over_compute for row in known],
            marker="o",
            color=line.get_color(),
        )
    ratio.axhline(1.0, color="black", linewidth=0.8)
    traffic.set(ylabel="GB a step", ylim=(0, None))
    traffic.set_title("\n".join(sweep.title.split(": ", 1)), fontsize="small")
    traffic.legend(title="solid: between servers, dotted: inside", fontsize="small", title_fontsize="small")
    ratio.set(xlabel="expert-parallel width (GPUs that hold the experts once)", ylabel="all-to-all / compute")
    ratio.set_xscale("log", base=2)
    ratio.set_ylim(bottom=0)
    ratio.set_xticks(widths, [str(ep) for ep in widths])
    for axes in (traffic, ratio):
        axes.grid(alpha=0.3)
    # Neither the time of drawing nor random names, so that the same sweep gives the same file.
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with rc_context({"svg.hashsalt": sweep.title}):
        write_atomically(path, lambda file: figure.savefig(file, format=kind, metadata=undated))
