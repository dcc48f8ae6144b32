"""Problem: a trace, a cluster, a model and the limits a placement must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from placer.batches import activations, uses_by_step
from placer.constraints import Constraints
from placer.counts import Counts
from placer.errors import Infeasible, InvalidInput
from placer.groups import check_groups, in_whole_groups
from placer.layer import Experts, Layer
from placer.memory import Memory
from placer.model import Model
from placer.placement import REPLICA_CHOICES
from placer.rules import Rules
from placer.seating import seated
from placer.topology import Topology
from placer.trace import Trace
from placer.traffic import Routes, Traffic

DEFAULT_RESERVE = 20e9
LOAD_MODELS = ("tokens", "activated")
NO_STEPS = (
    "found no step in the trace, expected the engine step of each token; --tokens-per-step N (Trace.rebatch) "
    "queues sequences into steps"
)
MAX_SLOTS = 1 << 17  # of a layer: far above any cluster, and its tables still fit into memory


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What to place, where, and within which limits; checked once, when it is made.

    Parameters
    ----------
    traffic : Traffic
        Load and pair counts of every layer.
    routes : Routes or None
        The tokens themselves; None for counts-only input, which load methods can use.
    topology : Topology
        The cluster, already in its shape.
    model : Model
        Sizes of vectors and experts.
    slots_per_rank : int
        Slots of every GPU in every layer.
    layer_ids : tuple of int
        The model's own layer numbers.
    num_groups : int
        Gate groups of consecutive experts.
    max_load : float or None
        Largest load of a GPU, server or rack over the mean of its level; None for no cap.
    load_margin : float or "auto"
        How much the search tightens that cap, so that it holds on unseen tokens.
    load_model : {"tokens", "activated"}
        What load caps count: tokens, or the steps in which an expert is used at all. The latter is the load of
        memory-bound decode, where a step reads the weights of every expert it uses once; routes must name the steps.
    replica_choice : str
        Dispatch rule: which copy a token takes.
    gpu_memory : float or tuple of float
        Bytes of a GPU; where they differ, of each GPU of a server or of the machine.
    reserve : float
        Bytes of each GPU kept for everything but experts.
    expert_dtype : str or None
        Storage of expert weights; None for the model's own.
    constraints : Constraints or None
        Experts pinned to units or kept apart, and slots kept empty.
    whole_groups : bool
        Whether gate groups stay whole, each in a stretch of slots of its own, as `placer.permute` needs it.

    Raises
    ------
    InvalidInput
        When a value is out of range.
    Infeasible
        When there are fewer slots than experts, the experts do not fit into memory, or the constraints cannot be kept.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"))
    >>> problem.num_ranks, problem.slots_per_rank, problem.max_load
    (2, 2, 1.05)
    """

    traffic: Traffic
    routes: Routes | None
    topology: Topology
    model: Model
    slots_per_rank: int
    layer_ids: tuple[int, ...]
    num_groups: int = 1
    max_load: float | None = 1.05
    load_margin: float | str = "auto"
    load_model: str = "tokens"
    replica_choice: str = "nearest"
    gpu_memory: float | tuple[float, ...]
    reserve: float = DEFAULT_RESERVE
    expert_dtype: str | None = None
    constraints: Constraints | None = None
    whole_groups: bool = False

    @classmethod
    def from_trace(
        cls,
        trace: Trace,
        topology: Topology,
        *,
        model: Model | None = None,
        redundant: int | None = None,
        slots_per_gpu: int | None = None,
        max_load: float | None = 1.05,
        load_margin: float | str = "auto",
        load_model: str = "tokens",
        replica_choice: str = "nearest",
        gpu_memory: float | tuple[float, ...] | None = None,
        reserve: float = DEFAULT_RESERVE,
        expert_dtype: str | None = None,
        constraints: Constraints | None = None,
        whole_groups: bool = False,
    ) -> Problem:
        """The problem of a trace; `redundant` slots over all ranks, or `slots_per_gpu`, or none to spare."""
        # Before the tokens are counted, which takes seconds on a large trace.
        slots = slots_per_rank(trace.num_experts, topology.num_ranks, redundant, slots_per_gpu)
        return cls(
            traffic=Traffic.from_trace(trace),
            routes=Routes.from_trace(trace),
            topology=topology,
            model=model or Model.for_trace_name(trace.model, trace.num_experts),
            slots_per_rank=slots,
            layer_ids=trace.layer_ids,
            num_groups=trace.num_groups,
            max_load=max_load,
            load_margin=load_margin,
            load_model=load_model,
            replica_choice=replica_choice,
            gpu_memory=(topology.gpu_memories or topology.gpu_memory) if gpu_memory is None else gpu_memory,
            reserve=reserve,
            expert_dtype=expert_dtype,
            constraints=constraints,
            whole_groups=whole_groups,
        )

    @classmethod
    def from_counts(
        cls,
        counts: Counts,
        topology: Topology,
        *,
        model: Model | None = None,
        redundant: int | None = None,
        slots_per_gpu: int | None = None,
        gpu_memory: float | tuple[float, ...] | None = None,
        **limits: Any,
    ) -> Problem:
        """The problem of loads alone, which methods that balance load can use; `limits` are further fields."""
        return cls(
            traffic=Traffic(num_tokens=counts.num_tokens or 0, load=counts.load),
            routes=None,
            topology=topology,
            model=model or Model.for_trace_name(counts.model, counts.num_experts),
            slots_per_rank=slots_per_rank(counts.num_experts, topology.num_ranks, redundant, slots_per_gpu),
            layer_ids=counts.layer_ids,
            num_groups=counts.num_groups,
            gpu_memory=(topology.gpu_memories or topology.gpu_memory) if gpu_memory is None else gpu_memory,
            **limits,
        )

    def __post_init__(self) -> None:
        if self.num_slots < self.num_experts:
            raise Infeasible(
                f"slots: {self.num_slots} a layer ({self.num_ranks} GPUs x {self.slots_per_rank}) "
                f"cannot hold {self.num_experts} experts"
            )
        if self.slots_per_rank > self.num_experts:
            raise InvalidInput(
                f"slots: found {self.slots_per_rank} on each GPU, expected at most {self.num_experts}, one an expert"
            )
        if self.num_slots > MAX_SLOTS:
            raise InvalidInput(
                f"slots: found {self.num_ranks} GPUs x {self.slots_per_rank} in a layer, expected at most {MAX_SLOTS}"
            )
        if self.routes is not None:
            found = (self.routes.num_tokens, self.routes.topk_idx.shape[1], self.routes.num_experts)
            expected = (self.num_tokens, self.num_layers, self.num_experts)
            if found != expected:
                raise InvalidInput(
                    f"routes: found (tokens, layers, experts) {found}, the traffic has {expected}"
                )
        if len(self.layer_ids) != self.num_layers:
            raise InvalidInput(f"layer ids: found {len(self.layer_ids)}, expected {self.num_layers}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise InvalidInput(
                f"groups: found {self.num_groups}, expected a divisor of {self.num_experts} experts"
            )
        if not 0 <= self.reserve < math.inf:
            raise InvalidInput(f"reserve: found {self.reserve}, expected 0 bytes or more")
        if self.max_load is not None and not 1.0 <= self.max_load < math.inf:
            raise InvalidInput(
                f"max load: found {self.max_load}, expected 1.0 or more (a unit's load over the mean)"
            )
        if self.load_margin != "auto" and not (
            isinstance(self.load_margin, int | float) and 0 <= self.load_margin < 1
        ):
            raise InvalidInput(
                f"load margin: found {self.load_margin!r}, expected 'auto' or a number in [0, 1)"
            )
        if self.load_model not in LOAD_MODELS:
            raise InvalidInput(
                f"load model: found {self.load_model!r}, expected one of {', '.join(LOAD_MODELS)}"
            )
        if self.load_model == "activated" and (self.routes is None or self.routes.step is None):
            raise InvalidInput(f"load model activated: {NO_STEPS}")
        if self.replica_choice not in REPLICA_CHOICES:
            raise InvalidInput(
                f"replica choice: found {self.replica_choice!r}, expected one of {', '.join(REPLICA_CHOICES)}"
            )
        if self.memory is not None:
            self.memory.require_any(self.num_experts, self.slots_per_rank)
        _ = self.rules  # raises where they cannot be kept
        if self.whole_groups:
            check_groups(self.num_experts, self.num_slots, self.num_groups)
            if self.constraints is not None:
                raise InvalidInput("whole groups: found constraints as well, expected one of the two")

    @cached_property
    def rules(self) -> tuple[Rules | None, ...]:
        """The constraints of every layer; None for each without any."""
        if self.constraints is None:
            return (None,) * self.num_layers
        return seated(
            self.constraints,
            layer_ids=self.layer_ids,
            num_experts=self.num_experts,
            shape=self.topology.shape,
            slots_per_rank=self.slots_per_rank,
        )

    @property
    def memory(self) -> Memory | None:
        """The room of every GPU for experts; None where the size of an expert is unknown."""
        return Memory.of(
            self.model,
            layers=self.num_layers,
            num_ranks=self.num_ranks,
            gpu_memory=self.gpu_memory,
            reserve=self.reserve,
            expert_dtype=self.expert_dtype,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens behind the statistics; 0 where counts do not say."""
        return self.traffic.num_tokens

    @property
    def num_layers(self) -> int:
        """Layers."""
        return int(self.traffic.load.shape[0])

    @property
    def num_experts(self) -> int:
        """Logical experts per layer."""
        return int(self.traffic.load.shape[1])

    @property
    def num_ranks(self) -> int:
        """GPUs."""
        return self.topology.num_ranks

    @property
    def num_slots(self) -> int:
        """Slots per layer over all GPUs."""
        return self.num_ranks * self.slots_per_rank

    @property
    def seconds_per_vector(self) -> tuple[float, ...]:
        """Seconds that one vector, there and back, occupies a GPU's share of each level's links."""
        size = self.model.dispatch_bytes + self.model.combine_bytes
        return tuple(size / level.effective_bandwidth for level in self.topology.levels)

    def layer(self, index: int, *, copies: bool = False) -> Layer:
        """One layer, as methods see it, with or without copies in its spare slots; layers count from 0."""
        if not 0 <= index < self.num_layers:
            raise InvalidInput(f"layer: found {index}, expected 0 to {self.num_layers - 1}")
        topk: Experts | None = None
        if self.routes is not None:
            column = self.routes.topk_idx[:, index]
            topk = column.astype(np.int16) if self.num_experts < 2**15 else column.astype(np.int32)
        step = None if self.routes is None else self.routes.step
        active = None
        if self.load_model == "activated" and topk is not None and step is not None:
            active = activations(uses_by_step(topk, step, self.num_experts))
        layer = Layer(
            index=index,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            slots_per_rank=self.slots_per_rank,
            unit_ranks=self.topology.unit_sizes,
            seconds=self.seconds_per_vector,
            server_ranks=self.topology.unit_sizes[self.topology.index("server")],
            rule=self.replica_choice,
            max_load=self.max_load,
            margin=0.0 if self.load_margin == "auto" else float(self.load_margin),
            load=self.traffic.load[index],
            activations=active,
            pair_counts=None if self.traffic.pairs is None else self.traffic.pairs[index],
            topk=topk,
            key=None if self.routes is None else self.routes.key,
            step=step,
            speeds=self.topology.speeds,
            num_groups=self.num_groups,
            copies=copies,
            rules=self.rules[index],
        )
        if not self.whole_groups:
            return layer
        if index not in self._stretches:
            self._stretches[index] = in_whole_groups(layer)
        return replace(layer, rules=self._stretches[index])

    @cached_property
    def _stretches(self) -> dict[int, Rules]:
        """The rules that keep the groups of a layer whole, by its index, once they are asked for."""
        return {}


def slots_per_rank(
    num_experts: int, num_ranks: int, redundant: int | None = None, slots_per_gpu: int | None = None
) -> int:
    """Slots of one GPU for `redundant` spare slots over all, or as given.

    Raises
    ------
    InvalidInput
        When slots do not divide by ranks; the message names the nearest number that does.

    Examples
    --------
    >>> slots_per_rank(64, 8, redundant=8)
    9
    >>> slots_per_rank(64, 24)
    Traceback (most recent call last):
    placer.errors.InvalidInput: 64 experts do not divide by 24 GPUs; the nearest ... is --redundant 8 (3 slots a GPU)
    """
    if slots_per_gpu is not None:
        if redundant is not None:
            raise InvalidInput("--redundant and --slots-per-gpu exclude each other")
        if slots_per_gpu < 1:
            raise InvalidInput(f"--slots-per-gpu: found {slots_per_gpu}, expected at least 1")
        return slots_per_gpu
    asked = 0 if redundant is None else redundant
    if asked < 0:
        raise InvalidInput(f"--redundant: found {asked}, expected 0 or more")
    total = num_experts + asked
    if total % num_ranks == 0:
        return total // num_ranks
    below = total // num_ranks * num_ranks - num_experts
    above = below + num_ranks
    near = above if below < 0 or above - asked <= asked - below else below
    said = f"{num_experts} experts" + (f" + {asked} redundant" if asked else "")
    raise InvalidInput(
        f"{said} do not divide by {num_ranks} GPUs; the nearest that fits is --redundant {near} "
        f"({(num_experts + near) // num_ranks} slots a GPU)"
    )
