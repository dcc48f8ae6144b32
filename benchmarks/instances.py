"""Instances: what is solved and scored, and the targets, as ``instances.toml`` names them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from placer import Problem, Topology, Trace, synth
from placer.errors import InvalidInput

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = Path(__file__).with_name("instances.toml")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a trace comes from: a `file`, or the preset `synth` with so many `layers`; `tokens` it must have."""

    tokens: int
    file: str | None = None
    synth: str | None = None
    layers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens of a trace: sequences with ``id % modulo == residue``, and of these the `domains`, if any are named.

    Examples
    --------
    >>> trace = Trace(topk_idx=np.zeros((4, 1, 1), int), num_experts=1, sequence=np.array([0, 1, 2, 4]))
    >>> Part(modulo=4).of(trace).sequence.tolist()
    [0, 4]
    """

    modulo: int = 1
    residue: int = 0
    domains: tuple[int, ...] = ()

    def of(self, trace: Trace) -> Trace:
        """The part of a trace."""
        keep = np.ones(trace.num_tokens, bool)
        if self.modulo > 1:
            keep &= _known(trace, "sequence") % self.modulo == self.residue
        if self.domains:
            keep &= np.isin(_known(trace, "domain"), self.domains)
        return trace if keep.all() else trace.select(keep)


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One problem: the part of a trace that is fitted, the part that is only scored, cluster and cap."""

    name: str
    source: Source
    topology: str
    shape: str
    fit: Part
    unseen: Part | None
    max_load: float | None
    load_margin: float | str
    time_limit: float
    skip: tuple[str, ...] = ()  # methods that `run --targets` leaves out here, as GLOBs

    def problem(self, trace: Trace) -> Problem:
        """The problem of fitting to `trace`."""
        return Problem.from_trace(
            trace, self.cluster, max_load=self.max_load, load_margin=self.load_margin, reserve=0.0
        )

    @property
    def cluster(self) -> Topology:
        """The topology in its shape."""
        return Topology.load(self.topology).with_shape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number of `auto` that must be `at_most` so much, a share `of_linear` of linear's, or at most those `below`."""

    instance: str
    measure: str
    at_most: float | None = None
    of_linear: float | None = None
    below: tuple[str, ...] = ()


def read(path: Path = SHIPPED) -> tuple[list[Instance], list[Target]]:
    """Instances and targets of a TOML file.

    Raises
    ------
    InvalidInput
        When the file cannot be read, or a key is unknown or missing.

    Examples
    --------
    >>> instances, targets = read()
    >>> instances[0].name, {target.instance for target in targets} <= {i.name for i in instances}
    ('tiny-slice/none', True)
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        sources = {name: Source(**table) for name, table in document["traces"].items()}
        instances = [i for table in document["instances"] for i in _instances(dict(table), sources)]
        targets = [
            Target(**{**table, "below": tuple(table.get("below", ()))})
            for table in document.get("targets", [])
        ]
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise InvalidInput(f"{path}: {error}") from None
    except KeyError as error:
        raise InvalidInput(f"{path}: found no {error}, expected it") from None
    names = [instance.name for instance in instances]
    if len(set(names)) < len(names) or not {target.instance for target in targets} <= set(names):
        raise InvalidInput(f"{path}: expected distinct names of instances, and targets that name one of them")
    return instances, targets


def parts(instance: Instance, traces: Path | None, cache: Path) -> tuple[Trace, Trace | None]:
    """The tokens to fit and those to score only.

    Parameters
    ----------
    traces : Path or None
        Folder of the files that are not in the repository.
    cache : Path
        Folder that keeps synthetic traces.

    Raises
    ------
    InvalidInput
        When the trace is not to be had; the message says why.
    """
    whole = trace(instance.source, traces, cache)
    return instance.fit.of(whole), None if instance.unseen is None else instance.unseen.of(whole)


def _instances(table: dict[str, Any], sources: dict[str, Source]) -> list[Instance]:
    name, caps, unseen = table.pop("name"), table.pop("caps"), table.pop("unseen", None)
    common: dict[str, Any] = {
        "topology": "dgx-h100",
        "time_limit": 60.0,
        "source": sources[table.pop("trace")],
    }
    common |= table | {
        "fit": _part(table.get("fit", {})),
        "unseen": None if unseen is None else _part(unseen),
        "skip": tuple(table.get("skip", ())),
    }
    found = []
    for cap in caps:
        limits = {"max_load": None, "load_margin": 0.0, **cap}
        label = "none" if limits["max_load"] is None else f"{limits['max_load']:g}"
        label += f"-{limits['load_margin']}" if limits["load_margin"] else ""
        found.append(Instance(name=f"{name}/{label}", **limits, **common))
    return found


def _part(table: dict[str, Any]) -> Part:
    return Part(**{**table, "domains": tuple(table.get("domains", ()))})


@lru_cache(maxsize=1)  # instances of one trace stand together; two large traces need not be held
def trace(source: Source, traces: Path | None, cache: Path) -> Trace:
    """A whole trace; folders and errors as in `parts`."""
    if source.synth is not None:
        path = cache / f"{source.synth}-{source.layers}x{source.tokens}.npz"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            made = synth(source.synth, layers=source.layers, tokens=source.tokens)
            made.save(path, compressed=False)  # so that it is mapped, not read
    elif source.file is None:
        raise InvalidInput("trace: found neither file nor synth, expected one of them")
    elif source.file.startswith("traces/"):
        path = ROOT / source.file
    elif traces is None:
        raise InvalidInput(
            f"{source.file} is not in the repository; --traces or PLACER_TRACES names its folder"
        )
    else:
        path = traces / source.file
    found = Trace.load(path)
    if found.num_tokens != source.tokens:
        raise InvalidInput(f"{path.name}: found {found.num_tokens} tokens, expected {source.tokens}")
    return found


def _known(trace: Trace, key: str) -> Any:
    array = getattr(trace, key)
    if array is None:
        raise InvalidInput(f"{trace.name}: found no array {key}, expected one to part the tokens by")
    return array
