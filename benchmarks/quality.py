"""Quality: methods x instances x seeds, recorded row by row, and what follows from the rows.

``python -m benchmarks.quality run --targets --traces DIR`` makes the table of targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import click

from benchmarks import runs, tables
from benchmarks.instances import SHIPPED, Instance, Target, parts, read
from placer import Budget
from placer.errors import InvalidInput, PlacerError
from placer.files import nearest, write_atomically
from placer.solvers import names

F = TypeVar("F", bound=Callable[..., Any])

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "placer"
METHODS = (
    tables.BASELINE,
    "random",
    "eplb",
    "lpt",
    "greedy",
    "spectral",
    "spectral+descent",
    "tabu",
    tables.CHAMPION,
)
PEERS = ("metis+descent", "kahip+descent", "mtkahypar+descent")
TARGET_METHODS = (
    tables.BASELINE,
    *PEERS,
    tables.CHAMPION,
    *(f"{tables.CHAMPION}{runs.RACE}{peer}" for peer in PEERS),
    f"{tables.CHAMPION}{runs.RACE}{PEERS[-1]}/5",
)

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


def shared(command: F) -> F:
    """Options of all commands: which rows, of which instances."""
    for option in (
        click.option(
            "--targets", "targets_only", is_flag=True, help="Instances with targets, and their table."
        ),
        click.option("--instance", "wanted", multiple=True, metavar="GLOB", help="Only these, as 'olmoe/*'."),
        click.option("--instances", "book", type=_FILE, default=SHIPPED, help="Another instances.toml."),
        click.option("--rows", type=_FILE, default=HERE / "runs.jsonl", show_default=True, help="The runs."),
    ):
        command = option(command)
    return command


class Group(click.Group):
    """Ends with the exit code of placer's own errors, in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PlacerError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure how good placements are."""


@main.command()
@shared
@click.option("--traces", type=_FOLDER, envvar="PLACER_TRACES", help="Folder with traces from elsewhere.")
@click.option("--cache", type=_FOLDER, default=CACHE, show_default=True, help="Folder for synthetic traces.")
@click.option("--method", "methods", multiple=True, help="NAME, NAME+descent or NAME@OTHER[/N]; repeat.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--time-limit", type=float, help="Seconds a run; by default the instance's own.")
@click.option("--rounds", type=click.IntRange(0), help="Rounds a layer, so that runs repeat exactly.")
@click.option("--jobs", type=click.IntRange(1), help="Layers at once; all cores by default.")
@click.option("--again", is_flag=True, help="Also what has been run with this very code.")
@click.pass_context
def run(
    ctx: click.Context,
    rows: Path,
    book: Path,
    wanted: Sequence[str],
    targets_only: bool,
    traces: Path | None,
    cache: Path,
    methods: Sequence[str],
    seeds: int,
    time_limit: float | None,
    rounds: int | None,
    jobs: int | None,
    again: bool,
) -> None:
    """Run methods on instances, add the rows to the file, print the table; runs already there are skipped."""
    import joblib

    instances, targets = _chosen(book, wanted, targets_only)
    methods = methods or (TARGET_METHODS if targets_only else METHODS)
    for method in methods:
        if method.partition(runs.RACE)[0].removesuffix(runs.DESCENT) not in names():
            raise InvalidInput(f"unknown method {method!r}; {nearest(method, names())}")
    jobs = jobs or int(joblib.cpu_count())
    done = set() if again else {row["key"] for row in runs.read(rows)}
    for instance in instances:
        try:
            fit, unseen = parts(instance, traces, cache)
        except PlacerError as error:
            click.echo(f"{instance.name} skipped: {error}", err=True)
            continue
        budget = Budget(seconds=instance.time_limit if time_limit is None else time_limit, rounds=rounds)
        for method in methods:
            if targets_only and any(fnmatchcase(method, glob) for glob in instance.skip):
                continue
            for seed in range(seeds):
                try:
                    own = runs.race_budget(runs.read(rows), instance.name, method, seed, budget)
                except InvalidInput as error:
                    click.echo(f"{instance.name} {method} skipped: {error}", err=True)
                    break
                question = (instance, fit, unseen, method, seed, own, jobs)
                if runs.key_of(*question) in done:
                    click.echo(f"{instance.name} {method} seed {seed}: there already", err=True)
                    continue
                try:
                    row = {**runs.measure(*question), "command": _command(ctx)}
                except (PlacerError, ImportError) as error:
                    click.echo(f"{instance.name} {method} skipped: {error}", err=True)
                    break
                runs.append(rows, row)
                click.echo(_line(row), err=True)
    click.echo(_text(rows, instances, targets, targets_only))


@main.command()
@shared
def table(rows: Path, book: Path, wanted: Sequence[str], targets_only: bool) -> None:
    """Print the table of the rows."""
    click.echo(_text(rows, *_chosen(book, wanted, targets_only), targets_only))


@main.command()
@shared
@click.option("-o", "output", type=_FILE, default=HERE / "RESULTS.md", show_default=True)
def report(rows: Path, book: Path, wanted: Sequence[str], targets_only: bool, output: Path) -> None:
    """Write RESULTS.md: where the rows come from, targets, and all tables."""
    instances, targets = _chosen(book, wanted, targets_only)
    found = _runs(rows, instances)
    text = (
        "# Results\n\nWritten by `python -m benchmarks.quality report`; do not edit. `instances.toml` says what each "
        "instance is.\n\n"
        f"{tables.provenance(found)}\n\n## Targets\n\n```text\n{tables.targets_table(found, targets)}\n```\n\n"
        f"## At equal time\n\n```text\n{tables.races(found)}\n```\n\n"
        f"## All runs\n\n```text\n{tables.summary(found)}\n```\n"
    )
    write_atomically(output, lambda file: file.write(text.encode()))


@main.command()
@shared
@click.option("-o", "output", type=_FILE, default=HERE / "quality.png", show_default=True)
def plot(rows: Path, book: Path, wanted: Sequence[str], targets_only: bool, output: Path) -> None:
    """Plot traffic against load and seconds; needs matplotlib."""
    from benchmarks.plot import draw

    instances, _ = _chosen(book, wanted, targets_only)
    draw(_runs(rows, instances), output)


def _chosen(book: Path, wanted: Sequence[str], targets_only: bool) -> tuple[list[Instance], list[Target]]:
    instances, targets = read(book)
    aimed = {target.instance for target in targets}
    chosen = [
        instance
        for instance in instances
        if (not targets_only or instance.name in aimed)
        and (not wanted or any(fnmatchcase(instance.name, glob) for glob in wanted))
    ]
    if not chosen:
        raise InvalidInput(
            f"{book}: found no instance of that name; {nearest('', [i.name for i in instances])}"
        )
    kept = {instance.name for instance in chosen}
    return chosen, [target for target in targets if target.instance in kept]


def _runs(rows: Path, instances: Sequence[Instance]) -> tables.Runs:
    found = tables.latest(runs.read(rows))
    found = {instance.name: found[instance.name] for instance in instances if instance.name in found}
    if not found:
        raise InvalidInput(f"{rows}: found no run of these instances, expected some; run them first")
    return found


def _text(rows: Path, instances: Sequence[Instance], targets: Sequence[Target], targets_only: bool) -> str:
    found = _runs(rows, instances)
    return tables.targets_table(found, targets) if targets_only else tables.summary(found)


def _line(row: runs.Row) -> str:
    scores = [row[part] for part in tables.PARTS if row[part]]
    traffic = " / ".join(f"{score['touched']['server']:.4f}" for score in scores)
    load = " / ".join(f"{score['load']['server']['max_over_mean']:.3f}" for score in scores)
    return f"{row['instance']} {row['method']} seed {row['seed']}: {traffic}, load {load}, {row['seconds']:.2f} s"


def _command(ctx: click.Context) -> str:
    """The command as given; paths, which mean nothing elsewhere, by their option's metavar."""
    words = ["python -m benchmarks.quality", ctx.info_name or ""]
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name or "") == click.core.ParameterSource.COMMANDLINE
        if not given or param.name == "again":
            continue
        values = ctx.params[param.name or ""]
        for value in values if isinstance(values, tuple) else (values,):
            words.append(param.opts[0])
            if isinstance(value, Path):
                words.append("DIR" if param.type is _FOLDER else "FILE")
            elif value is not True:
                words.append(f"'{value}'" if "*" in str(value) else str(value))
    return " ".join(words)


if __name__ == "__main__":
    main()
