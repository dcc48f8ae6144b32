"""Background: other traffic on the links that dispatch and combine use, in bytes per GPU and direction.

Bytes of everything that runs at the same time add up on a link, and the phase ends with the busiest link. Traffic
that runs before or after the phase costs its own time and does not belong here. Context parallelism, the
transfer of KV caches and checkpoints have no formula here; give their bytes as a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

from placer.errors import InvalidInput
from placer.files import nearest
from placer.quantity import parse_quantity

#: Level that each number of a `Background` belongs to.
LEVELS = ("gpu", "server", "rack")

#: Utilisation at which `growth` stops; a link any fuller has no finite queue to speak of.
LARGEST_UTILISATION = 0.95


@dataclass(frozen=True, kw_only=True)
class Background:
    """Other traffic during one phase (dispatch or combine of one layer), per GPU and direction.

    Parameters
    ----------
    gpu, server, rack : float
        Bytes that cross the links of that level: the scale-up link, the NIC, the rack's uplink.
    queueing : bool
        Whether this traffic, which keeps no step with the phase, also makes the phase queue; see `growth`.
    window : float or None
        Seconds over which these bytes are spread, for the utilisation; None for the time of the phase.

    Raises
    ------
    InvalidInput
        When bytes are negative or not finite, or the window is not above 0.

    Examples
    --------
    >>> Background(gpu=tensor_parallel_bytes(4096, 7168, 8)).gpu
    102760448.0
    """

    gpu: float = 0.0
    server: float = 0.0
    rack: float = 0.0
    queueing: bool = False
    window: float | None = None

    def __post_init__(self) -> None:
        for level in LEVELS:
            _require(f"background: {level}", getattr(self, level), "bytes >= 0")
        if self.window is not None and not 0 < self.window < inf:
            raise InvalidInput(f"background: window: found {self.window!r}, expected seconds > 0")

    @classmethod
    def parse(cls, text: str, *, queueing: bool = False, window: float | None = None) -> Background:
        """Read the bytes of some levels; the others have none.

        Raises
        ------
        InvalidInput
            When a part is not ``level=size``, or a level is unknown or named twice.

        Examples
        --------
        >>> Background.parse("gpu=100MB,server=20MB")
        Background(gpu=100000000.0, server=20000000.0, rack=0.0, queueing=False, window=None)
        """
        sizes: dict[str, float] = {}
        for part in text.split(","):
            level, equals, size = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise InvalidInput(
                    f"background: found {part!r}, expected level=size as in gpu=100MB,server=20MB"
                )
            if level not in LEVELS:
                raise InvalidInput(f"background: unknown level {level!r}; {nearest(level, LEVELS)}")
            if level in sizes:
                raise InvalidInput(f"background: found {level} twice in {text!r}, expected each level once")
            sizes[level] = parse_quantity(size, "bytes", f"background: {level}")
        return cls(**sizes, queueing=queueing, window=window)


def growth(utilisation: float) -> float:
    """How many times longer a link takes because unsynchronised traffic keeps it busy for this share of time.

    Mean sojourn over service time of an M/D/1 queue, ``1 + rho / (2 (1 - rho))`` (Pollaczek-Khinchine; Kleinrock,
    Queueing Systems I, 1975), with rho at most `LARGEST_UTILISATION`. Only for background: a closed all-to-all is no
    open queue and ends after bytes / bandwidth however full the link is.

    Parameters
    ----------
    utilisation : float
        Background bytes / (bandwidth * window), not negative.

    Raises
    ------
    InvalidInput
        When the utilisation is negative or not a number.

    Examples
    --------
    >>> growth(0.0), growth(0.5)
    (1.0, 1.5)
    """
    if not utilisation >= 0:
        raise InvalidInput(f"growth: found utilisation {utilisation}, expected at least 0")
    rho = min(utilisation, LARGEST_UTILISATION)
    return 1 + rho / (2 * (1 - rho))


def tensor_parallel_bytes(
    tokens: float, hidden_size: int, degree: int, *, element_bytes: float = 2.0
) -> float:
    """Bytes that a GPU sends, and receives, in one all-reduce of activations over a tensor-parallel group.

    ``2 (t - 1) / t`` times the activations (ring; Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). Megatron
    runs two a layer forward and two backward (arXiv 1909.08053); sequence parallelism moves the same bytes as a
    reduce-scatter and an all-gather.

    Parameters
    ----------
    tokens : float
        Tokens of a micro-batch.
    hidden_size : int
    degree : int
        GPUs of the group.
    element_bytes : float

    Raises
    ------
    InvalidInput
        When an argument is negative or not finite, or the degree is below 1.

    Examples
    --------
    >>> f"{tensor_parallel_bytes(4096, 7168, 8) / 1e6:.1f} MB"
    '102.8 MB'
    """
    return 2 * _share(degree) * _activations(tokens, hidden_size, element_bytes)


def pipeline_bytes(
    tokens: float, hidden_size: int, tensor_degree: int, *, element_bytes: float = 2.0
) -> float:
    """Bytes that a GPU sends over one pipeline boundary for one micro-batch, forward or backward.

    Each GPU of a tensor-parallel group sends its share of the activations (arXiv 2104.04473).

    Parameters
    ----------
    tokens : float
        Tokens of a micro-batch.
    hidden_size : int
    tensor_degree : int
        GPUs of the tensor-parallel group.
    element_bytes : float

    Raises
    ------
    InvalidInput
        When an argument is negative or not finite, or the degree is below 1.

    Examples
    --------
    >>> f"{pipeline_bytes(4096, 7168, 1) / 1e6:.1f} MB"
    '58.7 MB'
    """
    _require_degree(tensor_degree)
    return _activations(tokens, hidden_size, element_bytes) / tensor_degree


def data_parallel_bytes(
    parameters: float, degree: int, *, gradient_bytes: float = 2.0, parameter_bytes: float = 2.0
) -> float:
    """Bytes that a GPU sends, and receives, for data parallelism in one training step.

    A reduce-scatter of gradients and an all-gather of parameters, each ``(d - 1) / d`` of what the GPU holds (ZeRO,
    arXiv 1910.02054). Experts and the dense part have groups of different sizes: add a call for each.

    Parameters
    ----------
    parameters : float
        Parameters that a GPU holds.
    degree : int
        GPUs that hold the same parameters.
    gradient_bytes, parameter_bytes : float
        Bytes of one element; 4 for FP32 gradients, 0 leaves that half out.

    Raises
    ------
    InvalidInput
        When an argument is negative or not finite, or the degree is below 1.

    Examples
    --------
    >>> f"{data_parallel_bytes(639e6, 2) / 1e9:.2f} GB"
    '1.28 GB'
    """
    for what, value in (
        ("parameters", parameters),
        ("gradient_bytes", gradient_bytes),
        ("parameter_bytes", parameter_bytes),
    ):
        _require(what, value)
    return _share(degree) * parameters * (gradient_bytes + parameter_bytes)


def _activations(tokens: float, hidden_size: int, element_bytes: float) -> float:
    for what, value in (("tokens", tokens), ("hidden_size", hidden_size), ("element_bytes", element_bytes)):
        _require(what, value)
    return tokens * hidden_size * element_bytes


def _share(degree: int) -> float:
    """Share of a tensor that a GPU does not keep for itself in a group of this size."""
    _require_degree(degree)
    return (degree - 1) / degree


def _require(what: str, value: float, expected: str = "a number >= 0") -> None:
    if not (isfinite(value) and value >= 0):
        raise InvalidInput(f"{what}: found {value!r}, expected {expected}")


def _require_degree(degree: int) -> None:
    if not 1 <= degree < inf:
        raise InvalidInput(f"degree: found {degree!r}, expected at least 1 GPU")
