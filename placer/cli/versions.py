"""``placer versions``"""

from __future__ import annotations

import platform

import click

import placer
from placer.cli import options

_PACKAGES = ("numpy", "scipy", "numba", "ortools", "networkx", "click", "rich", "joblib")


@click.command(short_help="Print versions, for bug reports.", epilog="\b\nExample:\n  placer versions --json")
@options.as_json
def command(*, as_json: bool) -> None:
    """Print the versions of everything that a result depends on; paste it into bug reports."""
    facts = {
        "placer": placer.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": options.workers(None),
    }
    packages = {name: _version(name) for name in _PACKAGES}
    document = {"schema": "placer/versions/1", **facts, "packages": packages}
    lines = [
        f"{name:10} {value if value is not None else 'not installed'}"
        for name, value in {**facts, **packages}.items()
    ]
    options.show(document, "\n".join(lines), as_json)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
