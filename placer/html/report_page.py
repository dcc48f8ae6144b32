"""Report page: one placement on one trace, against contiguous experts, as a file that opens anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import placer
from placer.comparison import deciding_level
from placer.evaluation import check_match, evaluate
from placer.files import write_atomically
from placer.html import deploy, origin, packed, tables
from placer.html.evidence import belongs
from placer.html.gallery import BOTH, gallery, per_layer, runs
from placer.html.measures import RAILED, Measures, measure
from placer.html.numbers import Numbers
from placer.html.rendering import render, require
from placer.html.verdict import verdict
from placer.model import ASSUMED, Model
from placer.placement import Placement, format_shape
from placer.report import SHOWN_LINKS
from placer.topology import Topology
from placer.trace import Trace
from placer.traffic import Traffic

if TYPE_CHECKING:
    from markupsafe import Markup

SCHEMA = "placer/page/1"
TELLING = 0.3  # gaps up to this are worth a place in the verdict; all stand under search and proof


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page.

    Parameters
    ----------
    html : str
    document : dict
        The JSON block in it.
    verdict : str
        The sentence on top.
    """

    html: str
    document: dict[str, Any]
    verdict: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all."""
        write_atomically(path, lambda file: file.write(self.html.encode()))


def page(
    placement: Placement,
    trace: Trace,
    topology: Topology,
    *,
    linear: Placement | None = None,
    fitted: Trace | None = None,
    certificate: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    comparison: Mapping[str, Any] | None = None,
    name: str = "placement.json",
    command: str | None = None,
    **conditions: Any,
) -> Page:
    """Make the page of a placement.

    Parameters
    ----------
    placement, trace, topology
        As for `placer.evaluate`.
    linear : Placement, optional
        What it is compared to; by default contiguous experts, with as many copies in order.
    fitted : Trace, optional
        The tokens it was fitted on, shown beside the others; the trace itself where those are the same.
    certificate : mapping, optional
        ``placer/bound/1`` of this placement, on either trace.
    result : mapping, optional
        ``placer/result/1`` of a search on the trace, for the bound on its objective.
    events : sequence of mapping
        What the search said, see `placer.html.figures.convergence`.
    comparison : mapping, optional
        ``placer/comparison/1``, for the front.
    name : str
        The placement file, as commands name it.
    command : str, optional
        What made the page.
    **conditions
        As for `placer.evaluate`.

    Raises
    ------
    InvalidInput
        When jinja2 or plotly is missing, or what is given does not belong together.

    Examples
    --------
    >>> import numpy as np
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> better = Placement(physical_to_logical=np.array([[0, 2, 1, 3]]), num_experts=4, shape=(1, 2, 1))
    >>> made = page(better, trace, Topology.load("dgx-h100").with_shape("1x2x1"))
    >>> print(made.verdict)
    Better: 50 % less inter-server traffic than contiguous experts on this trace, busiest server 0 % above mean on
    average, 0 % in the worst layer.
    """
    require()
    check_match(placement, trace)
    linear = linear or contiguous(placement, trace, topology)
    placements = {"baseline": linear, "report": placement}
    document: dict[str, Any] = {"schema": SCHEMA}
    for which in BOTH:
        document[which] = evaluate(placements[which], trace, topology, **conditions).to_dict()
    seen = origin.tokens(placement, trace, fitted)
    beside = fitted is not None and not seen.same
    if fitted is not None and beside:
        check_match(placement, fitted)
        document["fitted"] = {
            which: evaluate(placements[which], fitted, topology, **conditions).to_dict() for which in BOTH
        }
    document |= _proof(document, certificate, result)
    measured = {which: measure(placements[which], trace, topology, conditions) for which in BOTH}
    brightest = 1.0
    if trace.top_k > 1:
        traffic = Traffic.from_trace(trace)
        document["coactivation"], brightest = packed.coactivation(
            traffic, trace.layer_ids, placements, topology
        )
    document["load"] = packed.load(measured, topology)
    document["flow"] = {"sampled": measured["report"].sampled}
    if comparison is not None:
        document["front"] = runs(comparison)
    if events:
        document["events"] = [dict(event) for event in events]
    document["figures"] = dict(gallery(document, measured, topology, brightest))

    numbers = Numbers(document)
    usual = "contiguous, with copies" if linear.has_copies else "contiguous"
    experts = "contiguous experts with copies" if linear.has_copies else "contiguous experts"
    judged = verdict(
        numbers,
        deciding_level(topology),
        seen.phrase,
        usual=experts,
        proof=_claim(document),
    )
    model = conditions.get("model") or Model.for_trace_name(trace.model, trace.num_experts)
    drawn = document["figures"]
    html = render(
        "report.html.j2",
        document,
        title=f"{trace.model or trace.name} on {format_shape(topology.shape)} {topology.name}",
        kind="Where the experts live, and what it costs",
        version=placer.__version__,
        sections=list(_sections(document)),
        verdict=judged,
        facts=_facts(numbers, trace),
        notes=[seen.note] if seen.note else [],
        usual=usual,
        experts=experts,
        tokens_word=seen.word,
        fitted=beside,
        rows=tables.before_after(numbers, topology.shape, ["", "fitted."] if beside else [""]),
        coactivation=_together(numbers, trace) if "coactivation" in document else None,
        layer_ids=trace.layer_ids,
        by_server="load_server" in drawn,
        flow=_flow(numbers, measured["report"], conditions, placement) if "flow_report" in drawn else None,
        links=list(_links(document, usual)),
        front=_on_front(document),
        proof=_on_proof(numbers),
        converged="convergence" in drawn,
        per_layer=[(key, said) for key, said, _ in per_layer(topology.shape)],
        ways=deploy.ways(placement, name, None if model is ASSUMED else model),
        origin=list(
            origin.facts(
                placement, trace, topology, fitted=fitted, name=name, conditions=conditions, command=command
            )
        ),
        assumptions=document["report"]["assumptions"],
        value=numbers.value,
    )
    return Page(html=html, document=document, verdict=judged.text)


def contiguous(placement: Placement, trace: Trace, topology: Topology) -> Placement:
    """Contiguous experts on the same machine, with as many copies in order of the experts."""
    from placer.allotment import even_slots
    from placer.baseline import baseline_placement
    from placer.problem import Problem

    problem = Problem.from_trace(
        trace,
        topology,
        slots_per_gpu=placement.slots_per_rank,
        max_load=None,
        load_margin=0.0,
        gpu_memory=1e18,  # the placement exists; whether it fits is told when it is priced
        replica_choice=placement.rule,
    )
    held = int((placement.physical_to_logical >= 0).sum())
    if held < placement.physical_to_logical.size:
        copies = held - placement.num_experts * placement.num_layers
        problem = replace(problem, slots_per_rank=even_slots(problem, copies))
    return baseline_placement(problem)


def _proof(
    document: Mapping[str, Any], certificate: Mapping[str, Any] | None, result: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What of the document tells of a bound: ``proof`` has ``gap``, ``touched`` or ``objective``, and ``bound``."""
    if certificate is not None:
        reports = {"report": document["report"]}
        if "fitted" in document:
            reports["fitted"] = document["fitted"]["report"]
        on = belongs(certificate, reports)
        known = {
            key: certificate.get(key) for key in ("level", "touched", "bound", "gap", "max_load", "method")
        }
        return {"proof": {"of": "touched", "on": on, **known}}
    if result is not None and result.get("gap") is not None:
        known = {key: result.get(key) for key in ("objective", "bound", "gap")}
        return {"proof": {"of": "objective", "on": "report", "method": result.get("bound_method"), **known}}
    return {}


def _claim(document: Mapping[str, Any]) -> str:
    """What is proved, for the end of the verdict."""
    proof = document.get("proof")
    if proof is None or proof["gap"] is None or proof["gap"] > TELLING:
        return ""
    if proof["of"] == "objective":
        return "modelled link time proven within {gap} of the best possible"
    unit = tables.NAMES[proof["level"]]
    cap = "" if proof["max_load"] is None else f" under its load cap of {proof['max_load']:g}"
    on = " on the tokens fitted" if proof["on"] == "fitted" else ""
    if proof["gap"] <= 0.0:
        return f"proven to touch the fewest {unit}s possible{cap}{on}"
    return f"{unit}s touched proven within {{gap}} of the fewest possible{cap}{on}"


def _on_proof(numbers: Numbers) -> Markup | None:
    from markupsafe import Markup

    proof = numbers.get("proof")
    if proof is None:
        return None
    if proof["bound"] is None:
        return Markup("No bound is known: {}.").format("there is none for placements with copies")
    gap = numbers.value("proof.gap", "gap")
    if proof["of"] == "objective":
        said = Markup("The modelled link time is proven to be within {} of the best possible, by {}.")
        return said.format(gap, proof["method"])
    unit = tables.NAMES[proof["level"]]
    tokens = "the tokens fitted" if proof["on"] == "fitted" else "these tokens"
    return Markup(
        "On {} the placement touches {} {}s a token and layer; no placement without copies{} touches fewer than {}. "
        "The gap between them is {}. Proved by {}."
    ).format(
        tokens,
        numbers.value("proof.touched", "number"),
        unit,
        "" if proof["max_load"] is None else f" under a load cap of {proof['max_load']:g}",
        numbers.value("proof.bound", "number"),
        gap,
        proof["method"],
    )


def _facts(numbers: Numbers, trace: Trace) -> Markup:
    from markupsafe import Markup

    return Markup("{} tokens of {}, {} layers, top {} of {} experts, {} all-to-all.").format(
        numbers.value("report.tokens", "count"),
        trace.name,
        numbers.value("report.layers", "count"),
        trace.top_k,
        trace.num_experts,
        numbers.get("report.alltoall"),
    )


def _together(numbers: Numbers, trace: Trace) -> dict[str, Any]:
    layers = numbers.get("coactivation.layers")
    left = trace.num_layers - len(layers)
    note = (
        f"{len(layers)} of {trace.num_layers} layers are shown, so that the page stays small." if left else ""
    )
    inside = numbers.get("coactivation.inside") is not None
    return {
        "layers": layers,
        "note": note,
        "inside": inside,
        "after": numbers.value("coactivation.inside.report.all_layers", "percent") if inside else "",
        "before": numbers.value("coactivation.inside.baseline.all_layers", "percent") if inside else "",
    }


def _flow(
    numbers: Numbers, measured: Measures, conditions: Mapping[str, Any], placement: Placement
) -> dict[str, Any]:
    from markupsafe import Markup

    said = []
    if measured.moved_by == "GPU" and placement.shape[2] > 1:
        rail = " to the GPU of the same place in another server, which passes them on"
        railed = conditions.get("alltoall", "hierarchical") in RAILED
        said.append(
            f"Within a server over its scale-up links, between servers over NICs{rail if railed else ''}."
        )
    if conditions.get("homes", "uniform") == "uniform":
        said.append("Homes are uniform, so the rows of a server are alike; its columns say what it receives.")
    note = Markup(" ").join(said)
    if measured.sampled:
        note += Markup(" Each row is counted on {} tokens.").format(numbers.value("flow.sampled", "count"))
    return {"unit": measured.moved_by, "note": note}


def _links(document: Mapping[str, Any], usual: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for which, said, most in (("report", "this placement", None), ("baseline", usual, SHOWN_LINKS)):
        rows = document[which]["links"][:most]
        if rows:
            yield which, said, rows


def _on_front(document: Mapping[str, Any]) -> dict[str, str] | None:
    if "front" not in document:
        return None
    title = document["front"]["title"]
    return {
        "note": f"Runs on tokens held out ({title}); the star is this placement, and contiguous experts, on the tokens "
        "of this page. To the left is more even, further down is less traffic."
    }


def _sections(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    searched = "convergence" in document["figures"] or "proof" in document
    for id, name, there in (
        ("numbers", "Before and after", True),
        ("together", "Experts chosen together", "coactivation" in document),
        ("load", "Load", True),
        ("traffic", "Traffic", True),
        ("front", "Load against traffic", "front" in document),
        ("search", "Search and proof", searched),
        ("layers", "Layer by layer", True),
        ("deploy", "Deploy", True),
        ("origin", "Where this comes from", True),
    ):
        if there:
            yield id, name
