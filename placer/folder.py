"""Folders: what lies in one, without being led out of it; and new ones, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from placer.errors import InvalidInput
from placer.report import format_bytes


def files_within(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder and of the folders in it, relative to it and in order, and the folders passed over.

    Passed over are folders whose names begin with a dot: version control and the notes of downloads, which are about
    the files as they were. A link to a file counts as the file, where that lies in the folder as well or, as in the
    cache of the Hugging Face hub, among the ``blobs`` beside ``snapshots``.

    Raises
    ------
    InvalidInput
        When it is no folder or cannot be read, a link leads out of it or nowhere, or something is no regular file.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".git").mkdir(), (folder / "sub").mkdir(), (folder / "sub" / "a.txt").touch()
    (None, None, None)
    >>> [path.as_posix() for paths in files_within(folder) for path in paths]
    ['sub/a.txt', '.git']
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    files, hidden = [], []

    def fail(error: OSError) -> None:
        raise InvalidInput(f"{error.filename}: cannot be read: {error.strerror}") from None

    for at, folders, names in os.walk(folder, onerror=fail):
        for name in sorted(folders):
            if (Path(at) / name).is_symlink():
                raise InvalidInput(f"{Path(at) / name}: a link to a folder, expected files or links to files")
        hidden += [Path(at, name).relative_to(folder) for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(at) / name
            try:
                target = path.resolve(strict=True)
            except (OSError, RuntimeError):  # of Python below 3.13, where links go in a circle
                raise InvalidInput(f"{path}: a link that leads nowhere") from None
            if not any(target.is_relative_to(root) for root in inside):
                raise InvalidInput(f"{path}: a link that leads out of {folder}, to {target}")
            if not target.is_file():
                raise InvalidInput(f"{path}: not a regular file")
            if not os.access(target, os.R_OK):
                raise InvalidInput(f"{path}: cannot be read: Permission denied")
            files.append(path.relative_to(folder))
    return sorted(files), sorted(hidden)


@contextmanager
def new_folder(path: str | os.PathLike[str], size: int = 0) -> Iterator[Path]:
    """A temporary folder beside `path` to fill, renamed to `path` at the end; removed when anything goes wrong.

    Parameters
    ----------
    path : path
        What must not exist yet, or be an empty folder.
    size : int
        Bytes that will be written, to be told at once when they do not fit.

    Raises
    ------
    InvalidInput
        When something is in the way, the place cannot be written, or the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "new"
    >>> with new_folder(target) as folder:
    ...     _ = (folder / "a").write_text("42")
    ...     target.exists()
    False
    >>> (target / "a").read_text()
    '42'
    """
    check_new(path)
    target = Path(os.path.realpath(path))
    try:
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise InvalidInput(
                f"{path}: cannot be written: it takes {format_bytes(size)}, "
                f"the disk has {format_bytes(free)} left"
            )
        # The name says what it is, should the process be killed.
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield made
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        made.replace(target)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from None
        raise


def check_new(path: str | os.PathLike[str]) -> None:
    """Refuse a name that is taken, by anything but an empty folder that a new one can replace.

    Raises
    ------
    InvalidInput
        When it is.
    """
    target = Path(os.path.realpath(path))
    if os.path.ismount(target):
        raise InvalidInput(
            f"{path}: a mount point, which nothing can replace; expected a new folder, say in it"
        )
    try:
        taken = any(target.iterdir()) if target.is_dir() else target.exists()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    if taken:
        raise InvalidInput(f"{path}: is there already, expected a new or an empty folder")
