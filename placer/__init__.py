"""placer decides where the experts of a Mixture-of-Experts model live.

``Trace -> Problem -> solve -> Placement -> evaluate -> Report``; see the README for ten lines that do it all.
Names are resolved on first use, so that ``import placer`` stays light.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placer.allotment import shared_out as shared_out
    from placer.background import Background as Background
    from placer.certificate import Certificate as Certificate
    from placer.certificate import certify as certify
    from placer.comparison import Comparison as Comparison
    from placer.comparison import compare as compare
    from placer.constraints import Constraints as Constraints
    from placer.counts import Counts as Counts
    from placer.errors import PlacerError as PlacerError
    from placer.evaluation import evaluate as evaluate
    from placer.model import Model as Model
    from placer.permuted import permute as permute
    from placer.placement import Placement as Placement
    from placer.problem import Problem as Problem
    from placer.rebalance import rebalance_experts as rebalance_experts
    from placer.recorder import record as record
    from placer.report import Report as Report
    from placer.result import Budget as Budget
    from placer.result import Result as Result
    from placer.solution import solve as solve
    from placer.synthetic import synth as synth
    from placer.topology import Level as Level
    from placer.topology import Topology as Topology
    from placer.trace import Trace as Trace
    from placer.traffic import Routes as Routes
    from placer.traffic import Traffic as Traffic

__version__ = "0.1.0"

_HOME = {
    "Background": "background",
    "Budget": "result",
    "Certificate": "certificate",
    "Comparison": "comparison",
    "Constraints": "constraints",
    "Counts": "counts",
    "Level": "topology",
    "Model": "model",
    "Placement": "placement",
    "PlacerError": "errors",
    "Problem": "problem",
    "Report": "report",
    "Result": "result",
    "Routes": "traffic",
    "Topology": "topology",
    "Trace": "trace",
    "Traffic": "traffic",
    "certify": "certificate",
    "compare": "comparison",
    "evaluate": "evaluation",
    "permute": "permuted",
    "rebalance_experts": "rebalance",
    "record": "recorder",
    "shared_out": "allotment",
    "solve": "solution",
    "synth": "synthetic",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
