"""evaluate: the only judge of quality. A placement and a trace give a `Report`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.alltoall import scheme
from placer.background import Background
from placer.batches import activations, uses_by_step
from placer.census import Census, census
from placer.errors import InvalidInput
from placer.flows import Floats
from placer.homes import homes as homes_of
from placer.memory import worst_gpu_bytes
from placer.model import ASSUMED, Model
from placer.placement import REPLICA_CHOICES, Placement, format_shape
from placer.problem import DEFAULT_RESERVE
from placer.report import Report
from placer.speeds import in_time
from placer.step import Step
from placer.timing import GEMM_EFFICIENCY
from placer.topology import REPORTED, Topology
from placer.trace import Trace

#: Tokens of one step on each GPU: the batch of DeepEP's published prefill measurements.
TOKENS_PER_GPU = 4096
PASSES = ("forward", "training")


def evaluate(
    placement: Placement,
    trace: Trace,
    topology: Topology,
    *,
    model: Model | None = None,
    alltoall: str = "hierarchical",
    replica_choice: str | None = None,
    homes: str = "uniform",
    gpu_memory: float | tuple[float, ...] | None = None,
    reserve: float = DEFAULT_RESERVE,
    expert_dtype: str | None = None,
    tokens_per_gpu: int = TOKENS_PER_GPU,
    passes: str = "forward",
    capacity_factor: float | None = None,
    padded: bool = False,
    background: Background | None = None,
    best_split: bool = False,
    seed: int = 0,
) -> Report:
    """Price a placement on a trace.

    Parameters
    ----------
    placement : Placement
    trace : Trace
        With the layers of the placement.
    topology : Topology
        Given the placement's shape; of its own shape when the two agree.
    model : Model, optional
        Sizes; by default the one the trace names.
    alltoall : str
        Which vectors cross which links: a name from `placer.alltoall.SCHEMES`.
    replica_choice : str, optional
        Dispatch rule; by default the one the placement was made for.
    homes : {"uniform", "trace", "sticky"}
        Where tokens live, see `placer.homes.homes`.
    gpu_memory : float or tuple of float, optional
        Bytes of a GPU, or of each GPU of a server or of the machine; the topology's by default.
    reserve : float
        Bytes of each GPU that experts may not use.
    expert_dtype : str, optional
        Storage of expert weights; by default the model's own.
    tokens_per_gpu : int
        Tokens of one step on each GPU, for the seconds.
    passes : {"forward", "training"}
        ``training`` adds the backward pass: it mirrors dispatch and combine and computes twice as much.
    capacity_factor : float, optional
        Choices above this many times an expert's even share are dropped: the report says how many, compute
        shrinks; traffic is priced as if none were. Shares are those of the whole trace.
    padded : bool
        Buffers are padded to the hottest rank, so every link is as busy as the busiest.
    background : Background, optional
        Other traffic on the same links during each phase.
    best_split : bool
        Also report how even the load could be if each expert's tokens were split over its copies at best.
    seed : int
        Deals sequences to ranks when homes are sticky.

    Returns
    -------
    Report

    Raises
    ------
    InvalidInput
        When placement, trace and topology do not belong together.
    Infeasible
        When the experts do not fit into a GPU's memory.

    Examples
    --------
    >>> from placer import Placement, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> pairs = Placement(physical_to_logical=np.array([[0, 1, 2, 3]]), num_experts=4, shape=(1, 2, 1))
    >>> evaluate(pairs, trace, Topology.load("dgx-h100").with_shape("1x2x1")).touched["server"]
    1.0
    """
    if placement.shape != topology.shape:
        raise InvalidInput(
            f"shape: found {format_shape(topology.shape)} in topology {topology.name}, "
            f"expected {format_shape(placement.shape)} as in the placement"
        )
    check_match(placement, trace)
    sized = model or Model.for_trace_name(trace.model, trace.num_experts)
    rule = replica_choice or placement.rule
    if rule not in REPLICA_CHOICES:
        raise InvalidInput(f"replica choice: found {rule!r}, expected one of {', '.join(REPLICA_CHOICES)}")
    if tokens_per_gpu < 1:
        raise InvalidInput(f"tokens per GPU: found {tokens_per_gpu}, expected at least 1")
    if passes not in PASSES:
        raise InvalidInput(f"pass: found {passes!r}, expected one of {', '.join(PASSES)}")
    if capacity_factor is not None and not capacity_factor > 0:
        raise InvalidInput(f"capacity factor: found {capacity_factor}, expected more than 0")
    if best_split and topology.speeds:
        raise InvalidInput(
            f"best split: found gpu_speeds in topology {topology.name}, expected GPUs of one speed"
        )
    priced = scheme(alltoall)
    capacity = (topology.gpu_memories or topology.gpu_memory) if gpu_memory is None else gpu_memory
    held_bytes = worst_gpu_bytes(
        placement, sized, capacity=capacity, reserve=reserve, expert_dtype=expert_dtype
    )
    at = homes_of(trace, placement.num_ranks, homes, seed)
    counted = census(placement, trace, topology, rule=rule, homes=at, follow=priced.name == "follow")
    held = _shares_held(placement)
    step = Step(
        topology=topology,
        model=sized,
        scheme=priced,
        expert_dtype=expert_dtype,
        scale=tokens_per_gpu * placement.num_ranks / trace.num_tokens,
        passes=2 if passes == "training" else 1,
        capacity_factor=capacity_factor,
        padded=padded,
        background=background,
    )
    return Report(
        tokens=trace.num_tokens,
        layers=trace.num_layers,
        alltoall=alltoall,
        replica_choice=rule,
        best_split=_best_split(placement, counted) if best_split else None,
        memory={
            "worst_gpu_bytes": held_bytes,
            "capacity_bytes": float(np.min(capacity)),
            "reserve_bytes": reserve,
        },
        assumptions=_assumptions(step, tokens_per_gpu, homes, placement, rule),
        steps=None if trace.step is None else _steps(trace),
        load_per_step=None if trace.step is None else _per_step(placement, trace, topology, held),
        load_activated=None if trace.step is None else _activated(placement, trace, topology, held),
        **step.price(counted, held, trace.num_tokens, trace.layer_ids),
    )


def _best_split(placement: Placement, counted: list[Census]) -> dict[str, dict[str, float]]:
    from placer.split import best_split

    return best_split(placement, np.array([layer.experts for layer in counted]))


def _shares_held(placement: Placement) -> list[Floats]:
    """Share of each expert's tokens that each rank serves, (num_ranks, num_experts), copies sharing evenly."""
    shares = []
    for row in placement.physical_to_logical:
        ranks = np.repeat(np.arange(placement.num_ranks), placement.slots_per_rank)
        held = np.zeros((placement.num_ranks, placement.num_experts))
        np.add.at(held, (ranks[row >= 0], row[row >= 0]), 1.0)
        shares.append(held / np.maximum(held.sum(axis=0), 1.0))
    return shares


def _steps(trace: Trace) -> dict[str, float]:
    """How many steps the trace has, and the tokens of one on average."""
    number = len(np.unique(np.asarray(trace.step)))
    return {"number": number, "tokens": trace.num_tokens / number}


def _per_step(
    placement: Placement, trace: Trace, topology: Topology, held: list[Floats]
) -> dict[str, dict[str, float]]:
    """Busiest unit over mean of every step and layer: mean, 99th percentile and maximum; copies share evenly."""
    assert trace.step is not None
    heat: dict[str, list[Floats]] = {name: [] for name in REPORTED}
    for layer, shares in enumerate(held):
        ranks = _uses(trace, layer) @ shares.T
        for name in REPORTED:
            size = topology.unit_sizes[topology.index(name)]
            load = ranks.reshape(len(ranks), -1, size).sum(axis=2)
            load = load[load.any(axis=1)]
            heat[name].append(in_time(load, topology.speeds, size).max(axis=1) / load.mean(axis=1))
    return {
        name: {
            "mean": float(np.mean(rows)) if rows.size else 1.0,
            "p99": float(np.percentile(rows, 99)) if rows.size else 1.0,
            "max": float(rows.max(initial=1.0)),
        }
        for name, rows in ((name, np.concatenate(parts)) for name, parts in heat.items())
    }


def _activated(
    placement: Placement, trace: Trace, topology: Topology, held: list[Floats]
) -> dict[str, dict[str, float]] | None:
    """Busiest unit over mean where load is the steps in which each expert is used; None with copies."""
    if placement.has_copies:
        return None
    ranks = np.stack([shares @ activations(_uses(trace, layer)) for layer, shares in enumerate(held)])
    found = {}
    for name in REPORTED:
        size = topology.unit_sizes[topology.index(name)]
        load = ranks.reshape(len(ranks), -1, size).sum(axis=2)
        mean = load.mean(axis=1)
        slowest = in_time(load, topology.speeds, size).max(axis=1)
        heat = np.divide(slowest, mean, out=np.ones(len(mean)), where=mean > 0)
        found[name] = {"max_over_mean": float(heat.mean()), "worst_layer": float(heat.max())}
    return found


def _uses(trace: Trace, layer: int) -> npt.NDArray[np.int64]:
    return uses_by_step(
        np.asarray(trace.topk_idx[:, layer]).astype(np.int64), np.asarray(trace.step), trace.num_experts
    )


def check_match(placement: Placement, trace: Trace) -> None:
    """Check that a placement and a trace speak of the same experts and layers.

    Raises
    ------
    InvalidInput
        When they do not.

    Examples
    --------
    >>> trace = Trace(topk_idx=np.array([[[0, 1]]]), num_experts=4)
    >>> check_match(Placement(physical_to_logical=np.array([[0, 1]]), num_experts=2, shape=(1, 1, 2)), trace)
    Traceback (most recent call last):
    placer.errors.InvalidInput: experts: found 4 in trace ..., expected 2 as in the placement
    """
    for what, ours, theirs in (
        ("experts", placement.num_experts, trace.num_experts),
        ("layers", format_ids(placement.layer_ids), format_ids(trace.layer_ids)),
    ):
        if ours != theirs:
            raise InvalidInput(
                f"{what}: found {theirs} in trace {trace.name}, expected {ours} as in the placement"
            )


def format_ids(ids: tuple[int, ...]) -> str:
    """Layer numbers as text: a range where they are one.

    Examples
    --------
    >>> format_ids((3, 4, 5)), format_ids((1, 3))
    ('3..5', '1,3')
    """
    runs = ids == tuple(range(ids[0], ids[0] + len(ids)))
    return f"{ids[0]}..{ids[-1]}" if runs else ",".join(map(str, ids))


def _assumptions(
    step: Step, tokens_per_gpu: int, homes: str, placement: Placement, rule: str
) -> tuple[str, ...]:
    model, alltoall = step.model, step.scheme.name
    lives = {
        "uniform": "homes are uniform over all GPUs",
        "trace": "homes are the trace's source ranks",
        "sticky": "each sequence lives on one GPU, dealt by seed",
    }
    said = [
        lives[homes],
        f"seconds are for one step of {tokens_per_gpu} tokens on each GPU",
        "a phase takes its latency plus the busiest link's bytes over its effective bandwidth; no overlap",
        f"expert GEMMs reach {GEMM_EFFICIENCY:.0%} of the BF16 peak with many tokens an expert",
        "attention and shared experts are left out",
    ]
    if alltoall == "hierarchical":
        said.append("a vector crosses an uplink once per remote rack and a NIC once per remote server")
        said.append("inside a server one copy goes to every touched GPU, also to the one that passes it on")
    if alltoall == "follow":
        said.append(
            "tokens stay with their heaviest expert; touched and remote are counted from uniform homes"
        )
    if step.passes == 2:
        said.append(
            "the backward pass mirrors dispatch and combine and computes twice as much as the forward one"
        )
    if step.padded:
        said.append("buffers are padded to the hottest rank: every link is as busy as the busiest")
    if step.capacity_factor is not None:
        said.append(
            f"an expert serves at most {step.capacity_factor:g} times its even share; traffic as if none were dropped"
        )
    if step.background is not None:
        queues = " and makes them queue" if step.background.queueing else ""
        said.append(f"other traffic shares the links in each phase of each layer{queues}")
    if step.topology.speeds:
        said.append("GPUs differ in speed: load max/mean counts time, load over the share of the speed")
    if model.expert_width is None:
        said.append("expert size unknown: memory is not checked, compute takes 0 s")
    if model is ASSUMED:
        said.append(f"model unknown: hidden size {model.hidden_size} and BF16 assumed")
    else:
        dtypes = (
            f"{step.scheme.dispatch_dtype or model.dispatch_dtype} dispatch, "
            f"{step.scheme.combine_dtype or model.combine_dtype} combine"
        )
        said.append(f"model {model.name}: hidden size {model.hidden_size}, {dtypes}")
    if placement.has_copies:
        said.append(
            "each token takes copies in the fewest other servers, ties shared out evenly"
            if rule == "cover"
            else "each copy is picked independently of a token's other experts"
        )
    return tuple(said)
