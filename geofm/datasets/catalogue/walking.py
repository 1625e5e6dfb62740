"""Which scenes lie below a folder, and whether that has changed since."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd


def walk(root: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """List the scenes below a folder.

    Hidden files and folders are left out, and land-cover maps, which share the tree.

    Args:
        root: The folder.

    Returns:
        ``path`` (below the root), ``size`` (bytes) and ``mtime`` (ns) of each file, -1 for what
        cannot be looked at; and the time at which each folder was last changed, for
        :func:`changed`.
    """
    rows: list[tuple[str, int, int]] = []
    folders: dict[str, int] = {}
    for folder, mtime, entries in folders_below(root):
        folders[folder] = mtime
        prefix = f'{folder}/' if folder else ''
        if entries is None:
            rows.append((folder, -1, -1))
            continue
        rows += [(prefix + e.name, *file_state(e)) for e in entries if _is_scene(e.name)]
    # The catalogue itself changes the root: that counts by its entries.
    folders[''] = _entries(root)
    return as_listing(rows), folders


def folders_below(
    root: Path, whole: tuple[str, ...] = ()
) -> Iterator[tuple[str, int, list[os.DirEntry[str]] | None]]:
    """Walk a folder and those below it, through links too, each of them once.

    Hidden folders are left out. A folder that is reached by a link and without one is walked where
    it lies.

    Args:
        root: The folder.
        whole: Endings, in lower case, of names of folders that are taken for files.

    Yields:
        Path below the root, time of change (ns), and all entries that are no folders, in the order
        of their names; None if the folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    # Links come last.
    waiting, links = [''], list[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        path = os.path.join(root, folder) if folder else str(root)  # noqa: PTH118 - in the loop
        state = os.stat(path)  # noqa: PTH116
        if (state.st_dev, state.st_ino) in seen:
            # A link to a folder above, or two links to one folder.
            continue
        seen.add((state.st_dev, state.st_ino))
        prefix = f'{folder}/' if folder else ''
        try:
            with os.scandir(path) as found:
                # Arrow and Parquet have no place for other names, and no scene has one.
                entries = sorted((e for e in found if _is_text(e.name)), key=lambda e: e.name)
        except PermissionError:
            yield folder, state.st_mtime_ns, None
            continue
        files = []
        for entry in entries:
            if not _is_folder(entry) or entry.name.lower().endswith(whole):
                files.append(entry)
            # Snapshots and caches hold copies, which are no scenes of their own.
            elif not entry.name.startswith('.'):
                (links if entry.is_symlink() else waiting).append(prefix + entry.name)
        yield folder, state.st_mtime_ns, files


def as_listing(rows: list[tuple[str, int, int]]) -> pd.DataFrame:
    """Table of files.

    Args:
        rows: Path, size and time of change of each.

    Returns:
        Columns ``path``, ``size`` and ``mtime``.
    """
    listing = pd.DataFrame(rows, columns=['path', 'size', 'mtime'])
    return listing.astype({'path': 'str', 'size': np.int64, 'mtime': np.int64})


def file_state(path: 'str | os.DirEntry[str]') -> tuple[int, int]:
    """Size and time of change of a file.

    Args:
        path: The file.

    Returns:
        Bytes and nanoseconds; -1 if it cannot be looked at, or is no regular file but a pipe, say.
    """
    try:
        # An entry of a folder may know without asking the system.
        state = os.stat(path) if isinstance(path, str) else path.stat()  # noqa: PTH116
    except OSError:
        return -1, -1
    return (state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else (-1, -1)


def changed(root: Path, folder: str, mtime: int) -> bool:
    """Whether something came into a folder or left it.

    Args:
        root: The folder that was walked.
        folder: A folder below it.
        mtime: What :func:`walk` noted of that folder.

    Returns:
        Whether it has changed; files changed in place are not noticed.
    """
    try:
        if not folder:
            return _entries(root) != mtime
        return os.stat(os.path.join(root, folder)).st_mtime_ns != mtime  # noqa: PTH116, PTH118
    except OSError:
        return True


def _is_text(name: str) -> bool:
    """Whether a name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_scene(name: str) -> bool:
    """Whether a file is one of those that are catalogued; land-cover maps share the tree."""
    return name.endswith('.tif') and not name.startswith(('.', 'lc_')) and '_lc_' not in name


def _entries(root: Path) -> int:
    """A number that changes when a scene or folder of the root comes or goes."""
    with os.scandir(root) as entries:
        names = sorted(
            e.name
            for e in entries
            if _is_scene(e.name) or (_is_folder(e) and not e.name.startswith('.'))
        )
    content = '\0'.join(names).encode(errors='surrogateescape')
    return int.from_bytes(hashlib.sha256(content).digest()[:6], 'big')
