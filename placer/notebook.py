"""What values look like in a notebook: a plain table at once, a plotly figure on request."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from placer.errors import InvalidInput
from placer.topology import REPORTED

if TYPE_CHECKING:
    from placer.comparison import Comparison
    from placer.report import Report
    from placer.result import Result

Picture = dict[str, Any]  # a figure as plotly's plain data: "data" and "layout"


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", notes: Iterable[str] = ()
) -> str:
    """A table as HTML; every text is escaped, and None is shown as ``-``.

    Parameters
    ----------
    header : sequence of str
    rows : iterable of sequences
        Cells; the first of a row names it.
    title : str
        Caption.
    notes : iterable of str
        Lines below.

    Examples
    --------
    >>> print(table(["", "load"], [["<b>", 1.25], ["rest", None]], title="a & b"))
    <table><caption>a &amp; b</caption>
    <thead><tr><th></th><th>load</th></tr></thead>
    <tbody><tr><th>&lt;b&gt;</th><td>1.25</td></tr>
    <tr><th>rest</th><td>-</td></tr></tbody></table>
    """
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(
        f"<tr><th>{_shown(first)}</th>{''.join(f'<td>{_shown(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    below = "".join(f"\n<p>{escape(note)}</p>" for note in notes)
    return f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>{below}"


def draw(name: str, known: Mapping[str, Callable[[], Picture]]) -> Any:
    """The plotly figure of a name.

    Parameters
    ----------
    name : str
    known : mapping
        What makes the figures that there are, by name.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    InvalidInput
        When there is no such figure, or plotly is not installed.
    """
    if name not in known:
        raise InvalidInput(f"unknown figure {name!r}; known: {', '.join(known)}")
    if importlib.util.find_spec("plotly") is None:
        raise InvalidInput("a figure needs plotly, which is not installed: pip install 'placer[report]'")
    from plotly.graph_objects import Figure

    return Figure(known[name]())


def report_figures(report: Report) -> dict[str, Callable[[], Picture]]:
    """Figures of a report: ``load``, ``touched`` and ``remote`` of every layer, ``links``, ``seconds``."""
    from placer.html import figures

    def of_layers(values: Mapping[str, Sequence[float]], axis: str) -> Picture:
        layers = [str(number) for number in report.per_layer["layer_ids"]]
        lines = [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": level,
                "x": layers,
                "y": list(values[level]),
                "marker": {"symbol": symbol},
            }
            for level, symbol in zip(REPORTED, figures.SYMBOLS, strict=False)
        ]
        return _picture(lines, "layer", axis, x={"type": "category"})

    def seconds() -> Picture:
        phases = ["dispatch", "compute", "combine"]
        bars = {"type": "bar", "x": phases, "y": [report.seconds[phase] for phase in phases]}
        return _picture([bars], "phase", "seconds of a step")

    return {
        "load": lambda: of_layers(report.per_layer["load"], "busiest unit over mean"),
        "touched": lambda: of_layers(report.per_layer["touched"], "units a token touches"),
        "remote": lambda: of_layers(report.per_layer["remote"], "remote units of a token"),
        "links": lambda: figures.links(report.links),
        "seconds": seconds,
    }


def result_figures(result: Result) -> dict[str, Callable[[], Picture]]:
    """Figures of a result: ``servers``, where every expert stands (its first copy), and its number of ``copies``."""
    placement = result.placement
    servers = placement.slots_per_rank * placement.shape[2]
    layers = [str(number) for number in placement.layer_ids]

    def of_experts(values: Any, meaning: str) -> Picture:
        heat = {
            "type": "heatmap",
            "z": values.tolist(),
            "y": layers,
            "colorscale": "Cividis",
            "colorbar": {"title": {"text": meaning}},
        }
        return _picture([heat], "expert", "layer", y={"type": "category", "autorange": "reversed"})

    return {
        "servers": lambda: of_experts(placement.logical_to_physical[..., 0] // servers, "server"),
        "copies": lambda: of_experts(placement.replica_count, "slots"),
    }


def comparison_figures(comparison: Comparison) -> dict[str, Callable[[], Picture]]:
    """Figures of a comparison: ``front``, held-out traffic over load, and ``seconds`` of each run."""
    from placer.html import figures, gallery

    level = comparison.level
    runs = gallery.runs(comparison.to_dict())["rows"]
    return {
        "front": lambda: figures.front(
            runs,
            load=f"load.{level}, busiest over mean, held out",
            traffic=f"remote.{level}, held out",
        ),
        "seconds": lambda: figures.times(
            [run["text"] for run in runs], [row.seconds for row in comparison.rows]
        ),
    }


def _picture(
    data: list[dict[str, Any]],
    across: str,
    up: str,
    *,
    x: Mapping[str, Any] | None = None,
    y: Mapping[str, Any] | None = None,
) -> Picture:
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": across}, **(x or {})},
            "yaxis": {"title": {"text": up}, **(y or {})},
            "template": "plotly_white",
        },
    }


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    return escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell))
