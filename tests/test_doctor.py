"""`placer doctor` says what a bug report needs."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from terminal import placer

from placer.cli import doctor, versions
from placer.model import known
from placer.topology import shipped


def test_the_document_holds_versions_extras_cores_kernels_and_counts() -> None:
    document = placer("doctor", "--json").document
    assert document["schema"] == "placer/doctor/1"
    assert document["packages"]["numpy"] == metadata.version("numpy")
    assert document["threads"] >= 1
    assert document["cores"] >= 1
    assert (document["topologies"], document["models"]) == (len(shipped()), len(known()))
    assert Path(document["folder"], "cli", "doctor.py").is_file()


def test_the_text_has_a_line_for_each_fact() -> None:
    out = placer("doctor").out
    words = [line.split()[0] for line in out.splitlines()]
    assert words[:4] == ["placer", "python", "platform", "folder"]
    assert {"cores", "threads", "numba", "kernels", "known"} <= set(words)


@pytest.fixture
def half_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        "numpy>=1.26",
        "numpy>=1.26; extra == 'good'",
        "no-such-thing>=1; extra == 'bad'",
        "numpy; extra == 'bad'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: listed)


@pytest.mark.usefixtures("half_installed")
def test_an_extra_that_is_missing_comes_with_the_line_that_installs_it() -> None:
    extras = placer("doctor", "--json").document["extras"]
    assert extras["good"]["install"] is None
    assert extras["bad"]["install"] == "pip install 'placer[bad]'"
    assert extras["bad"]["packages"] == {"no-such-thing": None, "numpy": metadata.version("numpy")}
    lines = placer("doctor").out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("[bad]")] == [
        "missing no-such-thing: pip install 'placer[bad]'"
    ]


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_PACKAGES", ("no-such-thing",))
    assert "no-such-thing  missing" in placer("doctor").out
    assert "no-such-thing not installed" in placer("versions").out


def test_a_source_tree_that_is_not_installed_has_no_known_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert placer("doctor", "--json").document["extras"] == {}
    assert "not installed as a package" in placer("doctor").out


@pytest.mark.parametrize(
    ("folder", "kept", "said"),
    [
        (None, 0, "anew"),
        ("/somewhere", 0, "none compiled yet"),
        ("/somewhere", 3, "3 compiled, kept in /somewhere"),
    ],
)
def test_the_cache_of_kernels_is_said_in_words(folder: str | None, kept: int, said: str) -> None:
    assert said in doctor._state(folder, kept)


def test_compiled_kernels_are_counted_in_the_folder_that_numba_uses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from placer.search import counting

    class Stats:
        cache_path = str(tmp_path)

    class Kernel:
        stats = Stats()

    monkeypatch.setattr(counting, "count_pairs", Kernel())
    (tmp_path / "counting.count_pairs-11.py311.nbi").touch()
    (tmp_path / "counting.count_pairs-11.py311.1.nbc").touch()
    assert placer("doctor", "--json").document["kernels"] == {"folder": str(tmp_path), "kept": 1}


def test_settings_from_outside_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    assert placer("doctor", "--json").document["environment"]["MKL_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" in placer("doctor").out


def test_versions_keeps_its_keys() -> None:
    document = placer("versions", "--json").document
    assert list(document) == ["schema", "placer", "python", "platform", "cores", "packages"]
