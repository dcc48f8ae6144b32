"""Figures: numbers of reports as plotly figures, plain dictionaries that need no library to make.

Each has ``data`` and ``layout``, as ``plotly.graph_objects.Figure`` and ``Plotly.newPlot`` take them. Nothing is told
by colour alone: what is compared also differs in its symbol, dash or pattern, scales are cividis (Nuñez, Anderton,
Renslow 2018, doi:10.1371/journal.pone.0199239), and the two line colours have a contrast of 3 on white and on black.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Figure = dict[str, Any]
Numbers = Sequence[float] | npt.NDArray[np.floating]

BEFORE, AFTER, OURS = "#c8761b", "#2b83ba", "#c8761b"
SCALE = "Cividis"
COUNTED = 16  # units that are numbered one by one along an axis
USUAL, PLACED = "contiguous", "this placement"
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "cross",
    "x",
    "triangle-down",
    "pentagon",
    "hexagon2",
    "hourglass",
    "bowtie",
    "circle-open",
    "square-open",
    "diamond-open",
)
_LINE = {
    False: {
        "marker": {"color": BEFORE, "symbol": "circle-open", "size": 7},
        "line": {"color": BEFORE, "dash": "dot"},
    },
    True: {"marker": {"color": AFTER, "symbol": "square", "size": 6}, "line": {"color": AFTER}},
}


def plain(text: object) -> str:
    """Text that plotly shows as it is: its labels understand a little HTML.

    Examples
    --------
    >>> plain("<b>x</b>")
    '&lt;b&gt;x&lt;/b&gt;'
    """
    return html.escape(str(text), quote=False)


def per_layer(what: str, layers: Sequence[int], after: Numbers, before: Numbers | None = None) -> Figure:
    """One number of every layer.

    Parameters
    ----------
    what : str
        What the number is.
    layers : sequence of int
        The model's numbers of the layers.
    after, before : (num_layers,) floating
        Of the placement, and of contiguous experts.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": PLACED if ours else USUAL,
            "x": list(layers),
            "y": _list(values),
            **_LINE[ours],
        }
        for ours, values in ((False, before), (True, after))
        if values is not None
    ]
    told = {"hovertemplate": plain(what) + ", layer %{x}: %{y:.4g}<extra>%{fullData.name}</extra>"}
    margin = {"l": 45, "b": 40}
    axes = {
        "xaxis": _counting("layer", max(layers, default=0) - min(layers, default=0)),
        "yaxis": {"automargin": True, "zeroline": False},
    }
    return _figure([trace | told for trace in traces], margin=margin, **axes)


def load_bars(unit: str, after: Numbers, before: Numbers | None = None, *, group: int = 0) -> Figure:
    """The load of every unit as per cent above or below the mean, so that the bars start where they should end.

    Parameters
    ----------
    unit : str
        ``GPU`` or ``server``.
    after, before : (num_units,) floating
        Load over the mean.
    group : int
        Lines part every so many units; none with 0.
    """
    traces = [
        {
            "type": "bar",
            "name": PLACED if ours else USUAL,
            "x": list(range(len(values))),
            "y": _list(100.0 * (np.asarray(values) - 1.0)),
            "marker": {
                "color": AFTER if ours else "rgba(0,0,0,0)",
                "line": {"color": AFTER if ours else BEFORE, "width": 1},
                "pattern": {"shape": "" if ours else "/", "fgcolor": BEFORE, "size": 5},
            },
            "hovertemplate": unit + " %{x}: %{y:+.1f} %<extra>%{fullData.name}</extra>",
        }
        for ours, values in ((False, before), (True, after))
        if values is not None
    ]
    edges = range(group, len(after), group) if group else ()
    return _figure(
        traces,
        xaxis=_counting(unit, len(after)),
        yaxis=_axis("% above the mean", zeroline=True),
        shapes=[_edge(at - 0.5) for at in edges],
        bargap=0.15,
        bargroupgap=0.0,
    )


def coactivation(
    shares: npt.NDArray[np.floating] | None, top: float, *, edges: Sequence[int] = (), bar: bool = True
) -> Figure:
    """How often two experts are chosen by one token, in the order in which they stand.

    Parameters
    ----------
    shares : (num_slots, num_slots) floating, optional
        Of all tokens; None where a page fills them in.
    top : float
        The share that is shown brightest, as are those above.
    edges : sequence of int
        Slots at which a server begins.
    bar : bool
        Whether to show the scale.
    """
    rows = [] if shares is None else (100.0 * shares).tolist()
    lines = [shape for at in edges for shape in (_edge(at - 0.5), _edge(at - 0.5, across=True))]
    return _figure(
        [_matrix(rows, 100.0 * top, "%", "slot %{y} and slot %{x}: %{z:.3g} %", bar=bar)],
        xaxis=_axis("slot", constrain="domain", tickformat="d"),
        yaxis=_axis("slot", autorange="reversed", tickformat="d"),
        shapes=lines,
        margin={"t": 10, "b": 90},
    )


def flow(unit: str, moved: npt.NDArray[np.floating], top: float, *, group: int = 0) -> Figure:
    """Bytes that tokens living on one unit send to another.

    Parameters
    ----------
    unit : str
        ``GPU`` or ``server``.
    moved : (num_units, num_units) floating
        Bytes, from row to column.
    top : float
        The bytes that are shown brightest.
    group : int
        Lines part every so many units; none with 0.
    """
    name, size = _unit_of_bytes(top)
    lines = [
        shape
        for at in (range(group, len(moved), group) if group else ())
        for shape in (_edge(at - 0.5), _edge(at - 0.5, across=True))
    ]
    told = f"from {unit} %{{y}} to {unit} %{{x}}: %{{z:.3g}} {name}"
    return _figure(
        [_matrix((moved / size).tolist(), top / size, name, told)],
        xaxis=_counting(f"to {unit}", len(moved), constrain="domain"),
        yaxis=_counting(f"from {unit}", len(moved), autorange="reversed"),
        shapes=lines,
        margin={"t": 10, "b": 90},
    )


def icicle(nodes: Sequence[Mapping[str, Any]], top: float) -> Figure:
    """The machine from the outside in; each unit's colour is how long its links are busy in one step.

    Parameters
    ----------
    nodes : sequence of dict
        ``id``, ``parent`` (the id of the unit around, or ""), ``name``, ``gpus`` in it, of what leaves it in one step
        ``seconds`` and ``text``, and whether there is room for the text (``told``).
    top : float
        Seconds that are shown brightest.
    """
    return _figure(
        [
            {
                "type": "icicle",
                "ids": [node["id"] for node in nodes],
                "parents": [node["parent"] for node in nodes],
                "labels": [plain(node["name"]) for node in nodes],
                "text": [plain(node["text"]).replace(", ", "<br>") for node in nodes],
                "values": [node["gpus"] for node in nodes],
                "branchvalues": "total",
                "sort": False,
                "pathbar": {"visible": False},
                "tiling": {"orientation": "v"},
                "textposition": "middle center",
                "textinfo": "none",
                "texttemplate": ["%{label}<br>%{text}" if node["told"] else "" for node in nodes],
                "hovertemplate": "%{label}: %{text}<extra></extra>",
                "marker": {
                    "colors": [1e3 * node["seconds"] for node in nodes],
                    "colorscale": SCALE,
                    "cmin": 0.0,
                    "cmax": 1e3 * top or 1.0,
                    "showscale": True,
                    "colorbar": _bar("ms"),
                    "line": {"width": 1, "color": "#808080"},
                },
            }
        ],
        margin={"t": 10, "b": 50, "l": 5, "r": 5},
    )


def links(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The busiest links of a report (its ``links``), the busiest on top."""
    names = [plain(f"{row['link']}, {row['phase']}") for row in rows]
    return _figure(
        [
            {
                "type": "bar",
                "orientation": "h",
                "x": [1e3 * row["seconds"] for row in rows],
                "y": names,
                "marker": {"color": AFTER},
                "hovertemplate": "%{y}: %{x:.3g} ms<extra></extra>",
            }
        ],
        xaxis=_axis("ms busy in one step"),
        yaxis={"autorange": "reversed", "automargin": True},
    )


def front(
    points: Iterable[Mapping[str, Any]], ours: Mapping[str, Any] | None = None, *, load: str, traffic: str
) -> Figure:
    """Load against traffic; both are better when less, and nothing beats what is on the line in both.

    Parameters
    ----------
    points : iterable of dict
        ``method``, ``text``, ``load`` and ``traffic``, one for each run.
    ours : dict, optional
        The same of the placement that a page is about.
    load, traffic : str
        What the axes show.
    """
    runs = list(points)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    best = efficient(runs)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "showlegend": False,
            "x": [runs[at]["load"] for at in best],
            "y": [runs[at]["traffic"] for at in best],
            "line": {"color": AFTER, "dash": "dot", "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    for order, method in enumerate(methods):
        those = [run for run in runs if run["method"] == method]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(method),
                "x": [run["load"] for run in those],
                "y": [run["traffic"] for run in those],
                "text": [plain(run["text"]) for run in those],
                "marker": {"color": AFTER, "symbol": SYMBOLS[order % len(SYMBOLS)], "size": 10},
                "hovertemplate": "%{text}<br>load %{x:.3f}, traffic %{y:.3f}<extra></extra>",
            }
        )
    if ours is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": PLACED,
                "x": [ours["load"]],
                "y": [ours["traffic"]],
                "text": [PLACED],
                "textposition": "top center",
                "marker": {"color": OURS, "symbol": "star", "size": 16},
                "hovertemplate": "%{text}<br>load %{x:.3f}, traffic %{y:.3f}<extra></extra>",
            }
        )
    return _figure(traces, xaxis=_axis(load), yaxis=_axis(traffic))


def efficient(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions of the runs that no other beats in load and traffic, by load.

    Examples
    --------
    >>> efficient([{"load": 1.2, "traffic": 3.0}, {"load": 1.1, "traffic": 4.0}, {"load": 1.3, "traffic": 3.5}])
    [1, 0]
    """
    kept: list[int] = []
    for at in sorted(range(len(runs)), key=lambda at: (runs[at]["load"], runs[at]["traffic"], at)):
        if not kept or runs[at]["traffic"] < runs[kept[-1]]["traffic"]:
            kept.append(at)
    return kept


def convergence(events: Iterable[Mapping[str, Any]]) -> Figure:
    """The objective of a search and what was proved of it, both against contiguous experts, over time.

    Parameters
    ----------
    events : iterable of dict
        `placer.result.Event` as dictionaries, as ``placer solve --log`` writes them. Where the layers done begin
        anew, so does the line.
    """
    seconds: list[float | None] = []
    found: list[float | None] = []
    proved: list[float | None] = []
    told: list[str] = []
    before = 0
    for event in events:
        if event["linear"] <= 0:
            continue
        if event["done"] < before:
            for column in (seconds, found, proved):
                column.append(None)
            told.append("")
        before = event["done"]
        bound = event["bound"]
        seconds.append(event["seconds"])
        found.append(100.0 * (event["objective"] / event["linear"] - 1.0))
        proved.append(None if bound is None else 100.0 * (bound / event["linear"] - 1.0))
        told.append(f"{event['done']} of {event['layers']} layers")
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "objective",
            "x": seconds,
            "y": found,
            "text": told,
            "hovertemplate": "%{x:.1f} s, %{text}: %{y:+.1f} %<extra>objective</extra>",
            **_LINE[True],
        }
    ]
    if any(value is not None for value in proved):
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "proved: not below",
                "x": seconds,
                "y": proved,
                "text": told,
                "hovertemplate": "%{x:.1f} s, %{text}: %{y:+.1f} %<extra>bound</extra>",
                "marker": {"color": BEFORE, "symbol": "diamond", "size": 9},
                "line": {"color": BEFORE, "dash": "dash"},
            }
        )
    return _figure(traces, xaxis=_axis("seconds"), yaxis=_axis("% against contiguous"))


def times(names: Sequence[str], seconds: Sequence[float]) -> Figure:
    """Seconds of runs, side by side."""
    return _figure(
        [
            {
                "type": "bar",
                "orientation": "h",
                "y": [plain(name) for name in names],
                "x": list(seconds),
                "marker": {"color": AFTER},
                "hovertemplate": "%{y}: %{x:.3g} s<extra></extra>",
            }
        ],
        xaxis=_axis("seconds", rangemode="tozero"),
        yaxis={"autorange": "reversed", "automargin": True},
    )


def intervals(names: Sequence[str], means: Numbers, lows: Numbers, highs: Numbers, what: str) -> Figure:
    """Means with their intervals, and a line at zero."""
    middle, low, high = (np.asarray(values, float) for values in (means, lows, highs))
    return _figure(
        [
            {
                "type": "scatter",
                "mode": "markers",
                "y": [plain(name) for name in names],
                "x": middle.tolist(),
                "marker": {"color": AFTER, "symbol": "square", "size": 8},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": (high - middle).tolist(),
                    "arrayminus": (middle - low).tolist(),
                    "color": AFTER,
                },
                "hovertemplate": "%{y}: %{x:+.2f} %<extra></extra>",
            }
        ],
        xaxis=_axis(what, zeroline=True),
        yaxis={"autorange": "reversed", "automargin": True, "type": "category"},
    )


def _figure(
    traces: Sequence[Mapping[str, Any]], *, margin: Mapping[str, int] | None = None, **layout: Any
) -> Figure:
    return {
        "data": list(traces),
        "layout": {
            "margin": {"t": 30, "r": 10, "b": 45, "l": 60} | dict(margin or {}),
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0.0},
            "font": {"size": 13},
            "showlegend": sum("name" in trace for trace in traces) > 1,
            "dragmode": False,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            **layout,
        },
    }


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False, **more}


def _counting(title: str, number: int, **more: Any) -> dict[str, Any]:
    """An axis of whole numbers; plotly would put marks between few ones."""
    return _axis(title, tickformat="d", **({"dtick": 1} if number <= COUNTED else {}), **more)


def _bar(unit: str) -> dict[str, Any]:
    return {
        "ticksuffix": f" {unit}",
        "orientation": "h",
        "x": 0.5,
        "yref": "container",
        "y": 0.02,
        "yanchor": "bottom",
        "ypad": 0,
        "thickness": 10,
        "len": 0.9,
        "outlinewidth": 0,
    }


def _matrix(rows: list[list[float]], top: float, unit: str, told: str, *, bar: bool = True) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": rows,
        "zmin": 0.0,
        "zmax": top or 1.0,
        "colorscale": SCALE,
        "showscale": bar,
        "colorbar": _bar(unit),
        "hovertemplate": told + "<extra></extra>",
    }


def _edge(at: float, *, across: bool = False) -> dict[str, Any]:
    """A line between two units."""
    long, short = ("x", "y") if across else ("y", "x")
    ends = {f"{short}0": at, f"{short}1": at, f"{long}0": 0, f"{long}1": 1, f"{long}ref": "paper"}
    return {"type": "line", "line": {"color": "#9a9a9a", "width": 1}, **ends}


def _unit_of_bytes(top: float) -> tuple[str, float]:
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((name, size) for name, size in units if top >= size), ("B", 1.0))


def _list(values: Numbers) -> list[float]:
    return [float(value) for value in values]
