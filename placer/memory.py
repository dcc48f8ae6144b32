"""Memory: the bytes of experts on every GPU, over all layers, and what they leave room for.

A GPU holds the experts of its slots, a copy of every shared expert, and a reserve for everything else.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.errors import Infeasible, InvalidInput
from placer.model import Model
from placer.placement import Placement

Floats = npt.NDArray[np.float64]


def capacities(gpu_memory: float | Sequence[float], num_ranks: int) -> Floats:
    """Bytes of every GPU, from one size for all, one for each GPU of a server, or one for each GPU of the machine.

    Parameters
    ----------
    gpu_memory : float or sequence of float
        Bytes; a sequence repeats along the ranks, server after server.
    num_ranks : int

    Returns
    -------
    (num_ranks,) float64

    Raises
    ------
    InvalidInput
        When the sizes do not divide the GPUs.

    Examples
    --------
    >>> capacities([80e9, 40e9], 4).tolist()
    [80000000000.0, 40000000000.0, 80000000000.0, 40000000000.0]
    """
    sizes = np.atleast_1d(np.asarray(gpu_memory, np.float64))
    if sizes.ndim != 1 or sizes.size == 0 or num_ranks % sizes.size:
        raise InvalidInput(
            f"GPU memory: found {sizes.size} sizes, expected one, or as many as divide {num_ranks} GPUs"
        )
    return np.tile(sizes, num_ranks // sizes.size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """The room of every GPU for experts.

    Parameters
    ----------
    expert_bytes : float
        Bytes of one expert.
    shared_bytes : float
        Bytes of the shared experts of one layer, which every GPU holds.
    layers : int
    capacity : (num_ranks,) float64
        Bytes of every GPU.
    reserve : float
        Bytes of each GPU that experts may not use.

    Examples
    --------
    >>> model = Model(name="toy", hidden_size=1000, expert_width=1000, num_shared_experts=1)  # 6 MB an expert
    >>> memory = Memory.of(model, layers=10, num_ranks=2, gpu_memory=(1e9, 2e9), reserve=0.1e9)
    >>> memory.most_slots, memory.needed(np.array([140, 140])).tolist()
    (14, [1000000000.0, 1000000000.0])
    >>> memory.require(np.array([150, 150]))
    Traceback (most recent call last):
    placer.errors.Infeasible: memory: GPU 0 needs 1.06 GB (150 experts over 10 layers x 6.0 MB + 0.06 GB shared ...
    """

    expert_bytes: float
    shared_bytes: float
    layers: int
    capacity: Floats
    reserve: float

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        layers: int,
        num_ranks: int,
        gpu_memory: float | Sequence[float],
        reserve: float,
        expert_dtype: str | None = None,
    ) -> Memory | None:
        """The room for a model's experts, stored in `expert_dtype` or as the checkpoint does; None if their size
        is unknown."""
        size, shared = model.expert_bytes(expert_dtype), model.shared_bytes(expert_dtype)
        if size is None or shared is None:
            return None
        return cls(
            expert_bytes=size,
            shared_bytes=shared,
            layers=layers,
            capacity=capacities(gpu_memory, num_ranks),
            reserve=reserve,
        )

    @property
    def beside(self) -> float:
        """Bytes of each GPU that its slots may not use: shared experts and the reserve."""
        return self.layers * self.shared_bytes + self.reserve

    @property
    def most_slots(self) -> int:
        """Slots a layer that every GPU could fill: what the smallest one has room for."""
        least = float(self.capacity.min())
        if math.isinf(least):
            return sys.maxsize
        return max(0, int((least - self.beside) // (self.layers * self.expert_bytes)))

    def needed(self, experts: npt.NDArray[np.integer]) -> Floats:
        """Bytes that each GPU needs, (num_ranks,), for its number of experts over all layers."""
        needed: Floats = np.asarray(experts, np.float64) * self.expert_bytes + self.beside
        return needed

    def require(self, experts: npt.NDArray[np.integer]) -> None:
        """Refuse more experts on a GPU than it can hold.

        Parameters
        ----------
        experts : (num_ranks,) int
            Experts on each GPU, over all layers.

        Raises
        ------
        Infeasible
            With the GPU that is short of most bytes.
        """
        short = self.needed(experts) - self.capacity
        rank = int(short.argmax())
        if short[rank] > 0:
            raise self._infeasible(f"GPU {rank}", int(experts[rank]), float(self.capacity[rank]))

    def require_any(self, num_experts: int, slots_per_rank: int) -> None:
        """Refuse experts of which no placement at all could fit.

        Parameters
        ----------
        num_experts : int
            Logical experts of a layer.
        slots_per_rank : int
            Slots of every GPU in a layer; they may stay empty.

        Raises
        ------
        Infeasible
            With the smallest GPU and the least that the others leave to it.
        """
        total, most = self.layers * num_experts, self.layers * slots_per_rank
        room = np.clip(np.floor((self.capacity - self.beside) / self.expert_bytes), 0, most)
        if room.sum() >= total and (self.beside <= self.capacity).all():
            return
        rank = int(self.capacity.argmin())
        if (self.capacity == self.capacity[rank]).all():
            share = -(-total // self.capacity.size)  # of the fullest, at the least
            raise self._infeasible("a GPU", share, float(self.capacity[rank]))
        left = min(most, total - int(room.sum() - room[rank]))
        raise self._infeasible(f"GPU {rank}", max(0, left), float(self.capacity[rank]))

    def _infeasible(self, gpu: str, experts: int, capacity: float) -> Infeasible:
        needed = experts * self.expert_bytes + self.beside
        shared = f" + {self.layers * self.shared_bytes / 1e9:.2f} GB shared" if self.shared_bytes else ""
        return Infeasible(
            f"memory: {gpu} needs {needed / 1e9:.2f} GB ({experts} experts over {self.layers} layers x "
            f"{self.expert_bytes / 1e6:.1f} MB{shared} + {self.reserve / 1e9:.2f} GB reserve), "
            f"it has {capacity / 1e9:.2f} GB"
        )


def worst_gpu_bytes(
    placement: Placement,
    model: Model,
    *,
    capacity: float | Sequence[float],
    reserve: float,
    expert_dtype: str | None = None,
) -> float | None:
    """Bytes of experts on the fullest GPU, shared ones included; None where the model's expert size is unknown.

    Parameters
    ----------
    placement : Placement
    model : Model
    capacity : float or sequence of float
        Bytes of a GPU, see `capacities`.
    reserve : float
        Bytes of each GPU that experts may not use.
    expert_dtype : str, optional
        Storage of expert weights; the model's own by default.

    Raises
    ------
    Infeasible
        When the experts of a GPU and the reserve exceed its capacity.

    Examples
    --------
    >>> placement = Placement(physical_to_logical=np.array([[0, 1, 2, -1]]), num_experts=3, shape=(1, 1, 2))
    >>> model = Model(name="toy", hidden_size=10, expert_width=10)
    >>> worst_gpu_bytes(placement, model, capacity=1e6, reserve=0.0)
    1200.0
    """
    memory = Memory.of(
        model,
        layers=placement.num_layers,
        num_ranks=placement.num_ranks,
        gpu_memory=capacity,
        reserve=reserve,
        expert_dtype=expert_dtype,
    )
    if memory is None:
        return None
    held = (placement.physical_to_logical >= 0).reshape(placement.num_layers, placement.num_ranks, -1)
    experts = held.sum(axis=(0, 2))
    memory.require(experts)
    return float(experts.max() * memory.expert_bytes + memory.layers * memory.shared_bytes)
