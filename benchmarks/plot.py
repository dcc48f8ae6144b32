"""The plot: traffic against load and against time, one row of panels for each instance."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.tables import Runs, value

AXES = (("fitted.load.server.max_over_mean", "busiest server / mean"), ("seconds", "seconds"))


def draw(runs: Runs, path: Path) -> None:
    """Write the plot to a file whose ending gives the format; a point is a method, mean over its seeds.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    names = list(dict.fromkeys(method for methods in runs.values() for method in methods))
    figure = Figure(figsize=(10, 3.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), len(AXES), squeeze=False)
    for (instance, methods), row in zip(runs.items(), panels, strict=True):
        for (measure, label), panel in zip(AXES, row, strict=True):
            for method, rows in methods.items():
                number = names.index(method)
                panel.scatter(
                    np.mean([value(r, measure) for r in rows]),
                    np.mean([value(r, "fitted.touched.server") for r in rows]),
                    color=f"C{number % 10}",
                    marker="os^Dv"[number // 10 % 5],
                    label=method,
                )
            panel.set(title=instance, xlabel=label, ylabel="servers touched (fitted)")
            panel.grid(alpha=0.3)
            if measure == "seconds":
                panel.set_xscale("log")
        row[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
