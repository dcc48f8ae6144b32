"""What each stage of the search earns, and what two more could: ``python -m benchmarks.ablation --traces DIR``.

The stages are those of `placer.solvers.tabu.search`, begun at contiguous experts and taken apart; then come the set
partition of `placer.solvers.cpsat` and an exact re-split of every pair of units, which the package does not have.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import click
import numpy as np

from benchmarks import runs
from benchmarks.instances import SHIPPED, Instance, parts, read
from benchmarks.quality import CACHE
from benchmarks.resplit import resplit, splittable
from placer import Problem, Trace
from placer.clock import Clock
from placer.errors import InvalidInput, PlacerError
from placer.files import nearest, write_atomically
from placer.layer import Layer, Occupant
from placer.search import descend
from placer.solution import with_margin
from placer.solvers import cpsat, tabu
from placer.table import aligned

DEFAULT = ("olmoe/none", "olmoe/1.05", "gpt-oss/none", "gpt-oss/1.05")
HEADER = ("stage", "touched.server", "load", "seconds", "gain")
CAPTION = (
    "Means over layers, fitted tokens. touched.server: servers a token; load: busiest server over mean; seconds: of a "
    "layer,\non one core; gain: change of the searched cost against the stage before, 0 where no layer's changed."
)

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_WARM_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a layer has after a stage.

    Parameters
    ----------
    stage : str
    occupant : (num_slots,) int32
        The best arrangement so far.
    excess : float
        Load above the caps, tokens.
    cost : float
        Seconds of all tokens that placement can change: touched units weighted over the levels that are searched.
    touched : float
        Servers that a token touches.
    load : float
        Load of the busiest server over the mean.
    seconds : float
        Wall seconds of this stage alone.
    """

    stage: str
    occupant: Occupant
    excess: float
    cost: float
    touched: float
    load: float
    seconds: float


def stages(layer: Layer, rng: np.random.Generator) -> Iterator[tuple[str, Occupant]]:
    """The best arrangement after each stage; none is worse in (excess, cost) than the one before.

    All tokens are searched, where `placer.solvers.tabu.search` begins with a sample of a large trace. The re-split
    is left out where it does not apply: several levels, or units too large.
    """
    clock = Clock.start()
    best = tabu._Best(layer, layer.linear())
    yield "contiguous", best.occupant
    begun = tabu._arranged_by_pairs(layer, tabu._starts(layer, layer, best.occupant, rng), rng, clock)
    best.offer(begun[0])
    yield "tabu on pairs", best.occupant
    elite = tabu._Elite(layer, [])
    for start in begun:
        elite.add(descend(layer, start, exact=True, steps=tabu.STEPS, patience=tabu.QUICK, rng=rng)[0])
    best.offer(elite.members[0][1])
    yield "short exact search", best.occupant
    for _, member in tuple(elite.members):
        elite.add(tabu._searched(layer, member, rng))
    best.offer(elite.members[0][1])
    yield "exact tabu", best.occupant
    patience = tabu.STALL if len(layer.distinct[0]) <= tabu.SAMPLE else tabu.SAMPLE_STALL
    tabu._rounds(layer, layer, elite, best, patience, 0, rng, clock)
    yield "crossing, shuffling", best.occupant
    best.offer(cpsat.recombined(layer, best.occupant, elite.met, clock))
    yield "set partition", best.occupant
    if splittable(layer):
        best.offer(resplit(layer, best.occupant))
        yield "exact re-split", best.occupant


def ablated(layer: Layer, rng: np.random.Generator) -> list[Reached]:
    """What the layer has after each stage, and the seconds of each.

    Raises
    ------
    InvalidInput
        When there is nothing to search: no level that swaps change, or no load.
    """
    if len(layer.levels) == 0 or not layer.load.any():
        raise InvalidInput(f"layer {layer.index}: found nothing to search, expected load and several units")
    reached = []
    begun = time.perf_counter()
    for stage, occupant in stages(layer, rng):
        seconds = time.perf_counter() - begun
        touched, load = _servers(layer, occupant)
        excess, cost = layer.excess(occupant), layer.cost(occupant) - layer.cost_of(0.0)
        reached.append(
            Reached(
                stage=stage,
                occupant=occupant,
                excess=excess,
                cost=cost,
                touched=touched,
                load=load,
                seconds=seconds,
            )
        )
        begun = time.perf_counter()
    return reached


def _servers(layer: Layer, occupant: Occupant) -> tuple[float, float]:
    """Servers that a token touches, and load of the busiest over the mean."""
    from placer.search.counting import sum_touched

    slots = layer.server_ranks * layer.slots_per_rank
    server = (layer.positions(occupant) // slots).astype(np.int32)
    load = layer.unit_load(occupant, slots)
    touched = float(sum_touched(layer.tokens, server[None], np.ones(1)))
    return touched / len(layer.tokens), float(load.max() / load.mean())


def table(problem: Problem, layers: int | None, seed: int) -> str:
    """One row a stage: means over so many layers, evenly spread, or over all."""
    number = min(layers or problem.num_layers, problem.num_layers)
    spread = np.linspace(0, problem.num_layers - 1, number).round().astype(int).tolist()
    found = [ablated(problem.layer(index), np.random.default_rng([seed, index])) for index in spread]
    rows = []
    before: float | None = None
    for reached in zip(*found, strict=True):
        touched, load, seconds, cost = np.mean(
            [(r.touched, r.load, r.seconds, r.cost) for r in reached], axis=0
        )
        gain = None
        if before is not None:
            gain = "0" if cost == before else f"{100 * (cost / before - 1):+.3f} %"
        rows.append([reached[0].stage, f"{touched:.4f}", f"{load:.3f}", f"{seconds:.3f}", gain])
        before = float(cost)
    return aligned(HEADER, rows)


def _compile(instance: Instance, fit: Trace) -> None:
    """Run all stages on a few tokens, so that none is timed while its kernels compile."""
    few = fit.select(slice(None, None, max(1, fit.num_tokens // _WARM_TOKENS))).layers(slice(0, 1))
    ablated(with_margin(instance.problem(few)).layer(0), np.random.default_rng(0))


def _chosen(book: Path, wanted: Sequence[str]) -> list[Instance]:
    instances, _ = read(book)
    chosen = [i for i in instances if any(fnmatchcase(i.name, glob) for glob in wanted)]
    if not chosen:
        names = [instance.name for instance in instances]
        raise InvalidInput(f"{book}: found no instance of that name; {nearest(wanted[0], names)}")
    return chosen


def _page(tables: Sequence[str], seed: int) -> str:
    about = runs.surroundings()
    machine = f"{about['cpu']}, {about['cores']} cores; commit {about['commit']} (library {about['code']})"
    return (
        "# Ablation\n\nWritten by `python -m benchmarks.ablation`; do not edit. Seed "
        f"{seed}; {machine}.\n\n```text\n{CAPTION}\n\n" + "\n\n".join(tables) + "\n```\n"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traces", type=_FOLDER, envvar="PLACER_TRACES", help="Folder with traces from elsewhere.")
@click.option("--cache", "kept", type=_FOLDER, default=CACHE, show_default=True, help="For synthetic traces.")
@click.option("--instance", "wanted", multiple=True, metavar="GLOB", default=DEFAULT, show_default=True)
@click.option("--instances", "book", type=_FILE, default=SHIPPED, help="Another instances.toml.")
@click.option("--layers", type=click.IntRange(1), help="So many layers, evenly spread; all by default.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "output", type=_FILE, help="Also write the tables to this Markdown file.")
def main(
    traces: Path | None,
    kept: Path,
    wanted: Sequence[str],
    book: Path,
    layers: int | None,
    seed: int,
    output: Path | None,
) -> None:
    """Print what each stage of the search earns."""
    try:
        tables = []
        for instance in _chosen(book, wanted):
            try:
                fit, _ = parts(instance, traces, kept)
                _compile(instance, fit)
                rows = table(with_margin(instance.problem(fit)), layers, seed)
            except PlacerError as error:
                click.echo(f"{instance.name} skipped: {error}", err=True)
                continue
            tables.append(f"{instance.name}\n{rows}")
            click.echo(f"{tables[-1]}\n")
        if not tables:
            raise InvalidInput("found no instance that can be run, expected one")
        click.echo(CAPTION)
        if output is not None:
            page = _page(tables, seed)
            write_atomically(output, lambda file: file.write(page.encode()))
    except PlacerError as error:
        click.echo(f"error: {error}", err=True)
        click.get_current_context().exit(error.exit_code)


if __name__ == "__main__":
    main()
