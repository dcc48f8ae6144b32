"""The picture of the README: experts chosen together before and after, and what that does to traffic and load.

``python -m benchmarks.picture`` fits the shipped trace's one half of sequences and shows the other; the same picture
comes out every time. Needs matplotlib, of the dependency group ``bench``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import joblib
import numpy as np
import numpy.typing as npt

from placer import Budget, Placement, Problem, Report, Topology, Trace, evaluate, solve

ROOT = Path(__file__).parents[1]
TRACE, OUTPUT = ROOT / "traces" / "tinymoe.npz", ROOT / "docs" / "before-after.svg"
SHAPE, MAX_LOAD = "1x8x8", 1.05

NAMES = ("contiguous", "placer")
BARS: tuple[dict[str, Any], ...] = (
    {"facecolor": "white", "hatch": "////", "edgecolor": "#444444"},
    {"facecolor": "#00316e", "edgecolor": "#00316e"},  # the dark end of cividis
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Contiguous experts and those that were placed, on tokens that the search did not see.

    Parameters
    ----------
    reports : (before, after)
    layer : int
        The model's number of the layer that is shown, whose gain is the median one.
    together : (before, after) of (num_experts, num_experts) float
        Tokens that use both experts, over those that would if experts were chosen independently, in the order in which
        experts stand; nan on the diagonal.
    edges : (num_servers + 1,) int
        Where servers begin in that order, and the end of the last.
    title : str
    """

    reports: tuple[Report, Report]
    layer: int
    together: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
    edges: npt.NDArray[np.int64]
    title: str


def pair(trace: Trace, topology: Topology, *, budget: Budget, jobs: int = 1, method: str = "auto") -> Pair:
    """Fit one half of a trace's sequences, and look at the other."""
    fitted, unseen = trace.split(0.5)
    problem = Problem.from_trace(fitted, topology, max_load=MAX_LOAD, load_margin=0.0)
    placements = (
        solve(problem, "linear").placement,
        solve(problem, method, budget=budget, jobs=jobs).placement,
    )
    before, after = (evaluate(placement, unseen, topology) for placement in placements)
    gains = np.subtract(before.per_layer["touched"]["server"], after.per_layer["touched"]["server"])
    layer = int(np.argsort(gains, kind="stable")[len(gains) // 2])
    pairs = _lift(unseen, layer)
    racks, servers, gpus = topology.shape
    return Pair(
        reports=(before, after),
        layer=trace.layer_ids[layer],
        together=(_ordered(pairs, placements[0], layer), _ordered(pairs, placements[1], layer)),
        edges=np.arange(racks * servers + 1) * gpus * placements[0].slots_per_rank,
        title=f"{trace.name}: {unseen.num_tokens:,} tokens that the search did not see, {trace.num_layers} layers, "
        f"top-{trace.top_k} of {trace.num_experts} experts, {racks * servers} servers of {gpus} GPUs, "
        f"load capped at {MAX_LOAD} where fitted",
    )


def _lift(trace: Trace, layer: int) -> npt.NDArray[np.float64]:
    """Tokens that use both experts over those that would by chance, (num_experts, num_experts); 0 where none would."""
    chosen = np.asarray(trace.topk_idx[:, layer], np.int64)
    uses = np.zeros((len(chosen), trace.num_experts + 1))
    np.put_along_axis(uses, np.where(chosen < 0, trace.num_experts, chosen), 1.0, axis=1)
    both = uses[:, :-1].T @ uses[:, :-1]
    chance = np.outer(both.diagonal(), both.diagonal()) / len(chosen)
    return np.divide(both, chance, out=np.zeros_like(both), where=chance > 0)


def _ordered(pairs: npt.NDArray[np.float64], placement: Placement, layer: int) -> npt.NDArray[np.float64]:
    experts = placement.physical_to_logical[layer]
    shown = pairs[np.ix_(experts, experts)].astype(float)
    np.fill_diagonal(shown, np.nan)
    return shown


def draw(found: Pair, path: Path) -> None:
    """Write the picture; the ending of the name is the format.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "placer", "font.size": 10, "hatch.linewidth": 0.8}):
        figure = Figure(figsize=(11.0, 4.6), layout="constrained", facecolor="white")
        grid = figure.add_gridspec(2, 3, width_ratios=(1.0, 1.0, 0.62))
        maps = [figure.add_subplot(grid[:, column]) for column in (0, 1)]
        top = max(float(np.nanquantile(shown, 0.99)) for shown in found.together)
        for axes, shown, name in zip(maps, found.together, NAMES, strict=True):
            image = axes.imshow(shown, cmap="cividis", vmin=0.0, vmax=top, interpolation="nearest")
            middles = (found.edges[:-1] + found.edges[1:] - 1) / 2
            for edge in found.edges[1:-1]:
                axes.axhline(edge - 0.5, color="white", linewidth=0.8)
                axes.axvline(edge - 0.5, color="white", linewidth=0.8)
            axes.set_xticks(middles, [str(server) for server in range(len(middles))])
            axes.set_yticks(middles, [str(server) for server in range(len(middles))])
            axes.tick_params(length=0)
            axes.set_facecolor("#bbbbbb")
            axes.set_xlabel("server")
            axes.set_title(f"{name}: experts of layer {found.layer}, by server", fontsize=10)
        maps[0].set_ylabel("server")
        bar = figure.colorbar(
            image, ax=maps, orientation="horizontal", shrink=0.6, aspect=40, extend="max", pad=0.02
        )
        bar.set_label("tokens that use both experts, times as many as by chance")
        values = (
            ("servers a token touches", [report.touched["server"] for report in found.reports], 0.0),
            (
                "busiest server, load over mean",
                [report.load["server"]["max_over_mean"] for report in found.reports],
                1.0,
            ),
        )
        for row, (what, (before, after), even) in enumerate(values):
            axes = figure.add_subplot(grid[row, 2])
            for at, (value, style) in enumerate(zip((before, after), BARS, strict=True)):
                axes.barh(at, value, height=0.62, **style)
                change = "" if at == 0 else f"  ({100 * (after / before - 1):+.1f} %)"
                axes.annotate(
                    f"{value:.2f}{change}",
                    (value, at),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                )
            if even:
                axes.axvline(even, color="#999999", linewidth=1.0, linestyle=":")
            axes.set_yticks((0, 1), NAMES)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.6 * max(before, after))
            axes.set_title(what, loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(found.title, fontsize=10)
        extra = {"Date": None, "Title": found.title} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=extra)


@click.command()
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=OUTPUT, show_default=True
)
@click.option("--jobs", type=click.IntRange(min=1), default=joblib.cpu_count(), help="Threads.")
def main(output: Path, jobs: int) -> None:
    """Draw experts chosen together, before and after, and what that does to traffic and load."""
    topology = Topology.load("dgx-h100").with_shape(SHAPE)
    draw(pair(Trace.load(TRACE), topology, budget=Budget(seconds=None), jobs=jobs), output)
    click.echo(f"{output} written")


if __name__ == "__main__":
    main()
