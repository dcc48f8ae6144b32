"""evaluate: the only judge of quality. A placement and a trace give a `Report`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.alltoall import scheme
from placer.errors import InvalidInput
from placer.incidence import incidence
from placer.memory import worst_gpu_bytes
from placer.model import ASSUMED, Model
from placer.placement import REPLICA_CHOICES, Placement, format_shape
from placer.problem import DEFAULT_RESERVE
from placer.report import Report
from placer.timing import GEMM_EFFICIENCY, compute_seconds, phase_seconds
from placer.topology import REPORTED, Topology
from placer.trace import Trace

#: Tokens of one step on each GPU: the batch of DeepEP's published prefill measurements.
TOKENS_PER_GPU = 4096


def evaluate(
    placement: Placement,
    trace: Trace,
    topology: Topology,
    *,
    model: Model | None = None,
    alltoall: str = "hierarchical",
    replica_choice: str | None = None,
    gpu_memory: float | None = None,
    reserve: float = DEFAULT_RESERVE,
    expert_dtype: str | None = None,
    tokens_per_gpu: int = TOKENS_PER_GPU,
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
    alltoall : {"hierarchical", "naive"}
        Which vectors cross which links.
    replica_choice : str, optional
        Dispatch rule; by default the one the placement was made for.
    gpu_memory, reserve : float
        Bytes of a GPU (the topology's by default), and bytes of it that experts may not use.
    expert_dtype : str, optional
        Storage of expert weights; by default the model's own.
    tokens_per_gpu : int
        Tokens of one step on each GPU, for the seconds.

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
    enter = scheme(alltoall)
    capacity = topology.gpu_memory if gpu_memory is None else gpu_memory
    held_bytes = worst_gpu_bytes(
        placement, sized, capacity=capacity, reserve=reserve, expert_dtype=expert_dtype
    )

    levels = [topology.index(name) for name in REPORTED]
    units = [topology.num_units[level] for level in levels]
    size = sized.dispatch_bytes + sized.combine_bytes
    per_token = np.zeros((4, trace.num_layers, len(REPORTED)))  # touched, remote, bytes, load max/mean
    phases: dict[str, float] = dict.fromkeys(("dispatch", "combine", "compute"), 0.0)
    batch = tokens_per_gpu * placement.num_ranks / trace.num_tokens
    busiest = np.zeros(len(topology.levels))
    for layer in range(trace.num_layers):
        topk = np.ascontiguousarray(trace.topk_idx[:, layer], dtype=np.int32)
        counts = incidence(
            placement.physical_to_logical[layer],
            topk,
            num_experts=placement.num_experts,
            num_ranks=placement.num_ranks,
            unit_ranks=topology.unit_sizes,
            server_ranks=topology.unit_sizes[topology.index("server")],
            rule=rule,
            table=None if placement.table is None else placement.table[layer],
        )
        entering = enter(counts, topology)
        for column, (level, number) in enumerate(zip(levels, units, strict=True)):
            load = counts.load[level, :number]
            per_token[:, layer, column] = (
                counts.touched[level].sum() / trace.num_tokens,
                counts.remote[level].sum() / trace.num_tokens,
                entering[level].sum() * size / trace.num_tokens,
                load.max() / load.mean() if load.any() else 1.0,
            )
        phases["dispatch"] += phase_seconds(entering * batch, sized.dispatch_bytes, topology)
        phases["combine"] += phase_seconds(entering * batch, sized.combine_bytes, topology)
        held = (placement.physical_to_logical[layer].reshape(placement.num_ranks, -1) >= 0).sum(axis=1)
        phases["compute"] += compute_seconds(counts.load[0] * batch, held, topology, sized, expert_dtype)
        busiest += _link_seconds(entering * batch, size, topology)
    touched, remote, volume, heat = per_token
    return Report(
        tokens=trace.num_tokens,
        layers=trace.num_layers,
        alltoall=alltoall,
        replica_choice=rule,
        touched=_named(touched.mean(axis=0)),
        remote=_named(remote.mean(axis=0)),
        bytes_per_token=_named(volume.sum(axis=0)),
        load={
            name: {"max_over_mean": float(heat[:, i].mean()), "worst_layer": float(heat[:, i].max())}
            for i, name in enumerate(REPORTED)
        },
        seconds={**phases, "step": sum(phases.values())},
        bottleneck=_bottleneck(busiest, phases["compute"], topology),
        memory={"worst_gpu_bytes": held_bytes, "capacity_bytes": capacity, "reserve_bytes": reserve},
        assumptions=_assumptions(sized, alltoall, tokens_per_gpu, placement),
        per_layer={
            "layer_ids": list(trace.layer_ids),
            "touched": {name: touched[:, i].tolist() for i, name in enumerate(REPORTED)},
            "remote": {name: remote[:, i].tolist() for i, name in enumerate(REPORTED)},
            "load": {name: heat[:, i].tolist() for i, name in enumerate(REPORTED)},
        },
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


def _link_seconds(
    entering: npt.NDArray[np.float64], size: float, topology: Topology
) -> npt.NDArray[np.float64]:
    """Seconds of the busiest link of each level."""
    rate = np.array(
        [
            unit * level.effective_bandwidth
            for level, unit in zip(topology.levels, topology.unit_sizes, strict=True)
        ]
    )
    seconds: npt.NDArray[np.float64] = entering.max(axis=1) * size / rate
    return seconds


def _bottleneck(busiest: npt.NDArray[np.float64], compute: float, topology: Topology) -> str:
    level = int(busiest.argmax())
    if compute >= busiest[level]:
        return "compute" if compute > 0 else "none"
    return f"{topology.levels[level].name} links"


def _assumptions(model: Model, alltoall: str, tokens_per_gpu: int, placement: Placement) -> tuple[str, ...]:
    said = [
        "homes are uniform over all GPUs",
        f"seconds are for one step of {tokens_per_gpu} tokens on each GPU",
        "a phase takes its latency plus the busiest link's bytes over its effective bandwidth; no overlap",
        f"expert GEMMs reach {GEMM_EFFICIENCY:.0%} of the BF16 peak",
    ]
    if alltoall == "hierarchical":
        said.append("a vector crosses an uplink once per remote rack and a NIC once per remote server")
    if model.expert_width is None:
        said.append("expert size unknown: memory is not checked, compute takes 0 s")
    if model is ASSUMED:
        said.append(f"model unknown: hidden size {model.hidden_size} and BF16 assumed")
    else:
        dtypes = f"{model.dispatch_dtype} dispatch, {model.combine_dtype} combine"
        said.append(f"model {model.name}: hidden size {model.hidden_size}, {dtypes}")
    if placement.has_copies:
        said.append("each copy is picked independently of a token's other experts")
    return tuple(said)


def _named(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(REPORTED, values, strict=True)}
