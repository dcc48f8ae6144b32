"""``placer versions``"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import click

import placer
from placer.cli import options

_PACKAGES = ("numpy", "scipy", "numba", "ortools", "networkx", "click", "rich", "joblib")


@click.command(short_help="Print versions, for bug reports.", epilog="\b\nExample:\n  placer versions --json")
@options.as_json
def command(*, as_json: bool) -> None:
    """Print the versions of everything that a result depends on; 'placer doctor' says more."""
    found = {name: value for name, value in facts().items() if name != "folder"}
    document = {"schema": "placer/versions/1", **found, "packages": packages()}
    lines = [
        f"{name:10} {value if value is not None else 'not installed'}"
        for name, value in {**found, **packages()}.items()
    ]
    options.show(document, "\n".join(lines), as_json)


def facts() -> dict[str, Any]:
    """This installation and the machine it is on."""
    return {
        "placer": placer.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "folder": str(Path(placer.__file__).parent),
        "cores": options.workers(None),
    }


def packages() -> dict[str, str | None]:
    """Versions of the packages that placer needs; None for one that is not installed."""
    return {name: version(name) for name in _PACKAGES}


def version(package: str) -> str | None:
    """The version of an installed package.

    Examples
    --------
    >>> version("no-such-package") is None
    True
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return None
