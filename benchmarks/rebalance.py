"""`rebalance_experts` against EPLB, time and balance: ``python -m benchmarks.rebalance -o benchmarks/REBALANCE.md``.

Loads are synthetic: lognormal over experts, the sum of 16 steps with lognormal jitter. Times are medians of warm
calls for all layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks import runs
from placer.files import write_atomically
from placer.rebalance import best, hottest, rebalance_experts
from placer.solvers import eplb

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

STEPS, JITTER = 16, 0.3
TOY = (600, 560, 120, 120, 20, 10, 10, 10)  # vllm-project/vllm, pull request 37656

PAGE = """\
# Rebalancing by load alone

Written by `python -m benchmarks.rebalance -o benchmarks/REBALANCE.md`; do not edit. Seed {seed}; {machine}, shared
with other work.

`placer.rebalance_experts` against EPLB's published map (`placer.solvers.eplb.rebalance`, which reproduces it in
numpy). Loads: lognormal(0, sigma) for each expert, 16 steps with lognormal(0, 0.3) jitter. Time: median of {repeats}
warm calls for all layers, on one thread. Imbalance: hottest GPU over mean, mean over layers. Meetings: copies on a GPU
that has one already, all layers; `rebalance_experts` makes none. Worse: layers in which EPLB's map is better
balanced; all of these maps have meetings, which leave a slot idle.

{table}

Times of others, measured elsewhere (two cores of another shared machine, loads of the first seven rows drawn in the
same way, in milliseconds; vLLM 0.33.0's numpy EPLB, SGLang 0.5.23's vectorised EPLB, which is another algorithm, and
its imbalance):

| slots / nodes / GPUs | DeepSeek EPLB | vLLM | SGLang | SGLang imbalance |
| --- | --- | --- | --- | --- |
| 288 / 4 / 32 | 384 | 42 | 36 | 1.111 |
| 288 / 8 / 32 | 289 | 42 | 28 | 1.416 |
| 288 / 32 / 32 | 695 | 28 | 22 | 1.057 |
| 288 / 18 / 36 | 717 | 29 | 23 | 1.055 |
| 288 / 18 / 144 | 1635 | 29 | 29 | 1.481 |
| 320 / 8 / 64 | 287 | 31 | 27 | 1.443 |
| 512 / 32 / 256 | 4759 | 56 | 185 | 1.058 |

## The published toy

Loads 600, 560, 120, 120, 20, 10, 10, 10 on 8 devices with 2 slots each (vllm-project/vllm, pull request 37656;
FlashLB's 200.0 was measured elsewhere). Load of the hottest device:

| EPLB | FlashLB | `rebalance_experts` | `rebalance.best` |
| --- | --- | --- | --- |
| {theirs:.2f} | 200.00 | {ours:.2f} | {optimum}, {proved} in {seconds:.1f} s |
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: experts in `groups`, on `slots` over `gpus` in `nodes`."""

    slots: int
    nodes: int
    gpus: int
    experts: int = 256
    groups: int = 8
    layers: int = 58
    sigma: float = 1.0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """As `rebalance_experts` takes them."""
        return self.slots, self.groups, self.nodes, self.gpus

    def loads(self, seed: int) -> Floats:
        """(layers, experts)."""
        rng = np.random.default_rng(seed)
        mean = rng.lognormal(0.0, self.sigma, (self.layers, self.experts))
        return np.asarray((mean * rng.lognormal(0.0, JITTER, (STEPS, *mean.shape))).sum(axis=0))


CASES = (
    Case(slots=288, nodes=4, gpus=32),
    Case(slots=288, nodes=8, gpus=32),
    Case(slots=288, nodes=32, gpus=32),
    Case(slots=288, nodes=18, gpus=36),
    Case(slots=288, nodes=18, gpus=144),
    Case(slots=320, nodes=8, gpus=64),
    Case(slots=512, nodes=32, gpus=256),
    Case(slots=288, nodes=4, gpus=32, sigma=2.0),
    Case(slots=320, nodes=8, gpus=64, sigma=2.0),
    Case(slots=160, nodes=4, gpus=32, experts=128),
    Case(slots=72, nodes=4, gpus=8, experts=64),
    Case(slots=72, nodes=4, gpus=8, experts=64, sigma=2.0),
    Case(slots=16, nodes=2, gpus=8, experts=12, groups=4),
)

HEADER = (
    "slots / nodes / GPUs",
    "experts, sigma",
    "policy",
    "ms",
    "EPLB ms",
    "imbalance",
    "EPLB imbalance",
    "EPLB meetings",
    "worse",
)


def imbalance(phy2log: Ids, weight: Floats, num_gpus: int) -> Floats:
    """Load of the hottest GPU over the mean, (layers,).

    Examples
    --------
    >>> imbalance(np.array([[0, 1, 0, 2]]), np.array([[6.0, 1.0, 2.0]]), num_gpus=2).tolist()
    [1.1111111111111112]
    """
    count = np.stack([np.bincount(slots, minlength=weight.shape[1]) for slots in phy2log])
    heat = np.take_along_axis(weight / count, phy2log, axis=1).reshape(len(weight), num_gpus, -1).sum(axis=2)
    return np.asarray(heat.max(axis=1) / heat.mean(axis=1))


def meetings(phy2log: Ids, num_gpus: int) -> Ids:
    """Copies on a GPU that holds another of the same expert, (layers,).

    Examples
    --------
    >>> meetings(np.array([[0, 0, 1, 2], [0, 1, 0, 2]]), num_gpus=2).tolist()
    [1, 0]
    """
    held = np.sort(phy2log.reshape(len(phy2log), num_gpus, -1), axis=2)
    return np.asarray((held[..., 1:] == held[..., :-1]).sum(axis=(1, 2)))


def row(case: Case, seed: int, repeats: int) -> list[str]:
    """Cells of a case."""
    weight = case.loads(seed)
    rebalance_experts(weight[:1], *case.counts)  # compiles
    (ours, _, _), spent = _timed(lambda: rebalance_experts(weight, *case.counts), repeats)
    theirs, peer = _timed(lambda: eplb.rebalance(weight, *case.counts), repeats)
    mine, other = (imbalance(phy2log, weight, case.gpus) for phy2log in (ours, theirs))
    met = meetings(theirs, case.gpus)
    worse = mine > other * (1 + 1e-9)
    if meetings(ours, case.gpus).any() or (worse & (met == 0)).any():
        raise RuntimeError(f"{case}: a promise of rebalance_experts is broken")
    return [
        f"{case.slots} / {case.nodes} / {case.gpus}",
        f"{case.experts}, {case.sigma:g}",
        "global" if case.groups % case.nodes else "hierarchical",
        f"{1e3 * spent:.1f}",
        f"{1e3 * peer:.0f}",
        f"{mine.mean():.4f}",
        f"{other.mean():.4f}",
        str(met.sum()),
        f"{worse.sum()} of {case.layers}",
    ]


def page(seed: int, repeats: int) -> str:
    """The whole page."""
    rows = [HEADER, ["---"] * len(HEADER), *(row(case, seed, repeats) for case in CASES)]
    about = runs.surroundings()
    found, seconds = _timed(lambda: best(TOY, 8, 2), 1)
    return PAGE.format(
        seed=seed,
        repeats=repeats,
        machine=f"{about['cpu']}, {about['cores']} cores; library {about['code']}",
        table="\n".join(f"| {' | '.join(cells)} |" for cells in rows),
        theirs=float(hottest(eplb.rebalance([TOY], 16, 1, 1, 8)[0], TOY, 8)),
        ours=float(hottest(rebalance_experts([TOY], 16, 1, 1, 8)[0][0], TOY, 8)),
        optimum=f"{float(found.peak):.2f} = {found.peak}",
        proved="proved" if found.proved else f"bound {float(found.bound):.2f}",
        seconds=seconds,
    )


def _timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What it returns, and its median seconds."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        done = work()
        seconds.append(time.perf_counter() - begun)
    return done, median(seconds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "-o", "output", type=click.Path(dir_okay=False, path_type=Path), help="Also write the page here."
)
def main(seed: int, repeats: int, output: Path | None) -> None:
    """Print a page of times and balance, ours and EPLB's."""
    text = page(seed, repeats)
    click.echo(text, nl=False)
    if output is not None:
        write_atomically(output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
