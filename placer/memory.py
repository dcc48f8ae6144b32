"""Memory: the bytes of experts on every GPU, over all layers."""

from __future__ import annotations

from placer.errors import Infeasible
from placer.model import Model
from placer.placement import Placement


def worst_gpu_bytes(
    placement: Placement, model: Model, *, capacity: float, reserve: float, expert_dtype: str | None = None
) -> float | None:
    """Bytes of experts on the fullest GPU; None where the model's expert size is unknown.

    Parameters
    ----------
    placement : Placement
    model : Model
    capacity, reserve : float
        Bytes of a GPU, and those of them that experts may not use.
    expert_dtype : str, optional
        Storage of expert weights; the model's own by default.

    Raises
    ------
    Infeasible
        When the experts of a GPU and the reserve exceed its capacity.

    Examples
    --------
    >>> import numpy as np
    >>> placement = Placement(physical_to_logical=np.array([[0, 1, 2, -1]]), num_experts=3, shape=(1, 1, 2))
    >>> model = Model(name="toy", hidden_size=10, expert_width=10)
    >>> worst_gpu_bytes(placement, model, capacity=1e6, reserve=0.0)
    1200.0
    """
    size = model.expert_bytes(expert_dtype)
    if size is None:
        return None
    held = (placement.physical_to_logical >= 0).reshape(placement.num_layers, placement.num_ranks, -1)
    experts = held.sum(axis=(0, 2))
    rank = int(experts.argmax())
    require_room(
        f"GPU {rank}",
        int(experts[rank]),
        size,
        layers=placement.num_layers,
        capacity=capacity,
        reserve=reserve,
    )
    return float(experts[rank] * size)


def require_room(
    gpu: str, experts: int, expert_bytes: float, *, layers: int, capacity: float, reserve: float
) -> None:
    """Refuse more experts on a GPU than it can hold.

    Parameters
    ----------
    gpu : str
        Which GPU, in words.
    experts : int
        Experts on it, over all layers.
    expert_bytes : float
        Bytes of one expert.
    layers : int
        Layers, for the message.
    capacity, reserve : float
        Bytes of the GPU, and those of them that experts may not use.

    Raises
    ------
    Infeasible
        When the experts and the reserve exceed the capacity.

    Examples
    --------
    >>> require_room("a GPU", 3, 2e9, layers=1, capacity=10e9, reserve=5e9)
    Traceback (most recent call last):
    placer.errors.Infeasible: memory: a GPU needs 11.00 GB (3 experts over ...), it has 10.00 GB
    """
    needed = experts * expert_bytes + reserve
    if needed > capacity:
        raise Infeasible(
            f"memory: {gpu} needs {needed / 1e9:.2f} GB ({experts} experts over {layers} layers x "
            f"{expert_bytes / 1e6:.1f} MB + {reserve / 1e9:.2f} GB reserve), it has {capacity / 1e9:.2f} GB"
        )
