"""Writing whole files or none."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

import pytest

from placer.errors import InvalidInput
from placer.files import nearest, write_atomically


def fill(file: IO[bytes]) -> None:
    file.write(b"new")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InvalidInput, match="No space left"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_files_are_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", fill)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", fill)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_special_files_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidInput, match="not a regular file"):
        write_atomically(tmp_path / "fifo", fill)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be written"):
        write_atomically(tmp_path / "no" / "a", fill)


def test_hints_name_close_words_or_all() -> None:
    assert nearest("dgx-h10", ["dgx-h100", "mi300x"]) == "did you mean dgx-h100?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
