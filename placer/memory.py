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
    worst = float(experts[rank] * size)
    if worst + reserve > capacity:
        raise Infeasible(
            f"memory: GPU {rank} needs {(worst + reserve) / 1e9:.2f} GB ({experts[rank]} experts over "
            f"{placement.num_layers} layers x {size / 1e6:.1f} MB + {reserve / 1e9:.2f} GB reserve), "
            f"it has {capacity / 1e9:.2f} GB"
        )
    return worst
