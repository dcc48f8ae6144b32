"""Presets: sweeps with every parameter set.

An article on 512 GPUs, 64 experts and top-2 routing tells of about 400 GB between servers at an expert-parallel width
of 16 and of more than 800 GB at 32, while all-to-all over compute goes from 1.47 to 3.36. It does not publish the
parameters behind these figures. Those of the two ``article`` presets are fitted to them: the ratio at 16 is met by
construction, and in the first the one at 32 as well.

``article`` sends every token to every peer of its group, as an all-gather or a fixed buffer for each peer does, so
traffic grows with the number of peers. ``article-imbalance`` sends a token to its two experts only, in buffers that
are padded to the hottest GPU. Without the one or the other, traffic between servers grows by half at most from 16 to
32: twice the bytes is not what a dropless top-2 model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from placer.cliff import BASELINE, UNIFORM, Row, Sweep
from placer.errors import InvalidInput
from placer.files import nearest
from placer.model import Model
from placer.solvers.eplb import rebalance
from placer.sweep import sweep
from placer.topology import Topology

EXPERTS, TOP_K = 64, 2
WIDTHS = (1, 2, 4, 8, 16, 32)
NIC, SCALE_UP = (
    45e9,
    400e9,
)  # bytes a second, of one GPU's NIC or a rank's share of NICs, and of its scale-up link
ZIPF = 0.8  # expert e, counted from 1, is as popular as e ** -ZIPF; chosen by hand

_FITTED = (
    "the article does not publish its parameters: these are fitted to its figures, and meet 1.47 by construction",
    "twice the bytes from EP 16 to EP 32 is not what a dropless top-2 model does: it sends half as much again at most",
)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Sizes under which published figures come out; vectors in BF16, forward pass, all layers equal.

    Parameters
    ----------
    ranks, ranks_per_server : int
        Expert-parallel ranks in all, and in one server.
    tokens : int
        Tokens of one rank.
    hidden_size, expert_width, layers : int
    flops : float
        Operations per second of a rank, solved for so that the ratio at width 16 is 1.47.
    """

    ranks: int
    ranks_per_server: int
    tokens: int
    hidden_size: int
    expert_width: int
    layers: int
    flops: float

    @property
    def compute(self) -> float:
        """Seconds of the experts of an evenly loaded rank, three matrices each."""
        matrices = 3 * self.hidden_size * self.expert_width
        return 2 * matrices * self.tokens * TOP_K * self.layers / self.flops

    def row(
        self,
        ep: int,
        out: float,
        inside: float,
        *,
        queueing: float = 0.0,
        routing: str = UNIFORM,
        method: str = BASELINE,
        load: float = 1.0,
    ) -> Row:
        """A row from the vectors that a rank sends in one dispatch, over its NIC and inside its server, at once.

        Time on the NIC grows by ``1 / (1 - queueing)``, as in a queue (M/M/1) that is so much of the time occupied.
        """
        size = 2.0 * self.hidden_size * self.layers
        phase = max(out * size / NIC / (1.0 - queueing), inside * size / SCALE_UP)
        total = 2.0 * size * self.ranks / 1e9
        return Row(
            ep=ep,
            routing=routing,
            method=method,
            inter_server_gb=out * total,
            intra_server_gb=inside * total,
            seconds={
                "dispatch": phase,
                "combine": phase,
                "compute": self.compute,
                "step": 2 * phase + self.compute,
                "even_compute": self.compute,
            },
            load=load,
        )


BY_PEERS = Fit(
    ranks=128,  # tensor parallelism of 4 leaves 2 ranks of a server's 8 GPUs
    ranks_per_server=2,
    tokens=512,
    hidden_size=7168,
    expert_width=28672,
    layers=15,
    flops=385.25e12,
)
QUEUEING = 0.052  # of the NICs at EP 16; solved for so that the ratio at EP 32 is 3.36

BY_IMBALANCE = Fit(
    ranks=512,
    ranks_per_server=8,
    tokens=1024,
    hidden_size=7168,
    expert_width=10240,
    layers=5,
    flops=387e12,
)


def article(widths: Iterable[int] | None = None) -> Sweep:
    """Every token to every peer of its group.

    Examples
    --------
    >>> for row in article([16, 32]).rows:
    ...     print(row.ep, round(row.inter_server_gb, 1), round(row.a2a_over_compute, 2))
    16 394.6 1.47
    32 845.6 3.36
    """
    fit, rows = BY_PEERS, []
    for ep in _widths(widths):
        away = max(0, ep - fit.ranks_per_server)
        queueing = QUEUEING * away / (16 - fit.ranks_per_server)  # grows with the bytes in the same window
        inside = fit.tokens * (min(ep, fit.ranks_per_server) - 1)
        rows.append(fit.row(ep, fit.tokens * away, inside, queueing=queueing))
    title = _title(fit, "every token to every peer, TP 4, queueing on NICs")
    return Sweep(title=title, rows=tuple(rows), notes=_FITTED)


def article_imbalance(widths: Iterable[int] | None = None) -> Sweep:
    """Every token to its two experts, in buffers padded to the hottest GPU.

    ``linear`` keeps hot experts beside each other; ``lpt`` spreads them, as many experts on every GPU; ``eplb`` also
    has a spare slot on every GPU for a copy; ``uniform`` is the same without hot experts.

    Examples
    --------
    >>> for row in article_imbalance([16, 32]).rows:
    ...     print(row.ep, row.routing, row.method, round(row.inter_server_gb), round(row.a2a_over_compute, 2))
    16 zipf-0.8 linear 395 1.47
    16 zipf-0.8 lpt 189 0.7
    16 zipf-0.8 eplb 76 0.28
    16 uniform linear 75 0.28
    32 zipf-0.8 linear 804 2.99
    32 zipf-0.8 lpt 529 1.97
    32 zipf-0.8 eplb 115 0.43
    32 uniform linear 113 0.42
    """
    fit, rows = BY_IMBALANCE, []
    for ep in _widths(widths):
        choices, near = fit.tokens * TOP_K, min(ep, fit.ranks_per_server)
        for routing, method, load in (
            (f"zipf-{ZIPF}", BASELINE, hottest(ep)),
            (f"zipf-{ZIPF}", "lpt", hottest(ep, spare=0)),
            (f"zipf-{ZIPF}", "eplb", hottest(ep, spare=1)),
            (UNIFORM, BASELINE, 1.0),
        ):
            out, inside = choices * load * (ep - near) / ep, choices * load * (near - 1) / ep
            rows.append(fit.row(ep, out, inside, routing=routing, method=method, load=load))
    notes = (
        "buffers are padded to the hottest GPU: bytes are those of even load times load max/mean; compute is even",
        "lpt spreads the hot experts, but the hottest alone exceeds a GPU's share",
        "eplb spreads them with copies in one spare slot a GPU, and nothing of the excess is left",
    )
    title = _title(fit, "padded buffers, hot experts")
    return Sweep(title=title, rows=tuple(rows), notes=(*_FITTED, *notes))


def deepseek_v3_h800(widths: Iterable[int] | None = None) -> Sweep:
    """DeepSeek-V3 on 32 servers of 8 H800: 4096 tokens a GPU, FP8 to the experts, BF16 back (arXiv:2412.19437)."""
    model = replace(Model.named("deepseek-v3"), dispatch_dtype="fp8")
    return sweep(Topology.load("h800").with_shape((1, 32, 8)), widths, model=model)


PRESETS: dict[str, Callable[[Iterable[int] | None], Sweep]] = {
    "article": article,
    "article-imbalance": article_imbalance,
    "deepseek-v3-h800": deepseek_v3_h800,
}


def preset(name: str, widths: Iterable[int] | None = None) -> Sweep:
    """The sweep of a preset, at its own widths or at others.

    Raises
    ------
    InvalidInput
        When there is no such preset, or a width does not fit it.
    """
    if name not in PRESETS:
        raise InvalidInput(f"unknown preset {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name](widths)


def hottest(ep: int, *, spare: int | None = None) -> float:
    """Busiest GPU over mean when popularity follows Zipf's law.

    Parameters
    ----------
    ep : int
        GPUs, a divisor of the experts.
    spare : int, optional
        Spare slots of each GPU for copies, with experts spread by load; None leaves experts in order of popularity.

    Examples
    --------
    >>> [round(hottest(16, spare=spare), 2) for spare in (None, 0, 1)]
    [5.25, 2.51, 1.01]
    """
    load = np.arange(1, EXPERTS + 1) ** -ZIPF
    slots = np.arange(EXPERTS) if spare is None else rebalance([load], EXPERTS + spare * ep, 1, 1, ep)[0]
    share = load / np.bincount(slots, minlength=EXPERTS)
    held = share[slots].reshape(ep, -1).sum(axis=1)
    return float(held.max() / held.mean())


def _widths(widths: Iterable[int] | None) -> tuple[int, ...]:
    asked = WIDTHS if widths is None else tuple(sorted(set(widths)))
    for ep in asked:
        if ep < 1 or EXPERTS % ep:
            raise InvalidInput(f"EP {ep}: expected a divisor of the preset's {EXPERTS} experts")
    return asked


def _title(fit: Fit, what: str) -> str:
    sizes = f"{EXPERTS} experts, top-{TOP_K}, {fit.layers} layers of {fit.hidden_size} x {fit.expert_width}"
    return f"512 GPUs, {sizes}, {fit.tokens} tokens on each of {fit.ranks} ranks: {what}"
