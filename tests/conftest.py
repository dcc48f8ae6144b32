"""Options and fixtures that several test modules use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        metavar="PATH",
        default=os.environ.get("PLACER_SHARED"),
        help="folder with judge.py and traces/, for tests against measurements from outside the project "
        "(default: environment variable PLACER_SHARED)",
    )


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder of ``--shared``; tests that need it are skipped without."""
    path = request.config.getoption("--shared")
    if not path:
        pytest.skip("needs --shared PATH or PLACER_SHARED: a folder with judge.py and traces/")
    folder = Path(path)
    if not (folder / "judge.py").is_file():
        pytest.fail(f"--shared {path}: no judge.py in it")
    return folder
