"""``placer doctor``"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from placer.cli import options, versions

#: Settings from outside that change how fast placer runs, or whether it keeps what it compiled.
_VARIABLES = (
    "NUMBA_CACHE_DIR",
    "NUMBA_DISABLE_JIT",
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)
_REQUIREMENT = re.compile(r"([\w.-]+).*;\s*extra\s*==\s*['\"]([\w.-]+)['\"]")


@click.command(
    short_help="Say what is installed and what is missing.", epilog="\b\nExample:\n  placer doctor --json"
)
@options.as_json
def command(*, as_json: bool) -> None:
    """Say what placer finds around it: versions, extras, cores, compiled kernels; paste it into bug reports."""
    import numba

    from placer.model import known
    from placer.solvers import names
    from placer.topology import shipped

    document: dict[str, Any] = {
        "schema": "placer/doctor/1",
        **versions.facts(),
        "packages": versions.packages(),
        "extras": _extras(),
        "threads": numba.get_num_threads(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "kernels": _kernels(),
        "topologies": len(shipped()),
        "models": len(known()),
        "methods": len(names()),
    }
    options.show(document, "\n".join(_lines(document)), as_json)


def _extras() -> dict[str, dict[str, Any]]:
    """What each extra would install, as the metadata of the installed package lists it."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        listed = requires("placer") or []
    except PackageNotFoundError:  # run from a source tree
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for line in listed:
        if match := _REQUIREMENT.match(line):
            package, extra = match.groups()
            found.setdefault(extra, {})[package] = versions.version(package)
    return {
        extra: {
            "packages": packages,
            "install": f"pip install 'placer[{extra}]'" if None in packages.values() else None,
        }
        for extra, packages in found.items()
    }


def _kernels() -> dict[str, Any]:
    """Where compiled kernels are kept, and how many of them there are."""
    from placer.search.counting import count_pairs

    folder = getattr(getattr(count_pairs, "stats", None), "cache_path", None)
    kept = len(list(Path(folder).glob("*.nbi"))) if folder else 0
    return {"folder": folder, "kept": kept}


def _lines(document: dict[str, Any]) -> list[str]:
    """The document as text, a line each."""
    facts = ("placer", "python", "platform", "folder", "cores", "threads")
    rows = [(name, str(document[name])) for name in facts]
    rows += [
        (name, version or "missing: pip install placer") for name, version in document["packages"].items()
    ]
    for extra, found in document["extras"].items():
        missing = [package for package, version in found["packages"].items() if version is None]
        there = ", ".join(f"{package} {version}" for package, version in found["packages"].items() if version)
        said = f"missing {', '.join(missing)}: {found['install']}" if missing else there
        rows.append((f"[{extra}]", said))
    if not document["extras"]:
        rows.append(("extras", "unknown: placer is not installed as a package"))
    rows.append(("kernels", _state(**document["kernels"])))
    rows += list(document["environment"].items())
    rows.append(
        ("known", ", ".join(f"{document[kind]} {kind}" for kind in ("topologies", "models", "methods")))
    )
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {said}" for name, said in rows]


def _state(folder: str | None, kept: int) -> str:
    """The cache of kernels in words.

    Examples
    --------
    >>> _state(None, 0)
    'no folder to keep them in: every process compiles them anew, for about half a minute'
    """
    if folder is None:
        return "no folder to keep them in: every process compiles them anew, for about half a minute"
    if not kept:
        return f"none compiled yet in {folder}: the first run takes about half a minute more"
    return f"{kept} compiled, kept in {folder}"
