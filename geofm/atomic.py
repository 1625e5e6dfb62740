"""Writing files and folders so that a final name never holds something half-written.

Everything is written beside its final name and renamed when it is whole, in the same folder, since
a rename is only atomic within one file system. The temporary name tells who is writing, so that
a later run can remove what a killed one left behind.
"""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: ``.{final name}.{host}.{process}.part{suffix of the final name}``
_PART = re.compile(r'\.(?P<name>.+)\.(?P<host>[^.]*)\.(?P<pid>\d+)\.part(?:\.[^.]*)?')


def _host() -> str:
    """Name of this machine, without dots."""
    return re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())


def part_of(path: Path) -> Path:
    """Temporary name for a file or folder that this process is about to write.

    Args:
        path: Final name.

    Returns:
        A hidden name in the same folder, with the same suffix, since GDAL, NumPy and others choose
        a format by it.
    """
    return path.with_name(f'.{path.name}.{_host()}.{os.getpid()}.part{path.suffix}')


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file beside its final name and rename it when it is whole.

    Missing parent folders are made. Leftovers of killed runs for the same name are removed.

    Args:
        path: Final name.

    Yields:
        Name to write to. After an exception it is removed, and a file that already had the final
        name stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    part = part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder beside its final name and rename it when it is whole.

    Args:
        path: Final name; it must not exist, or be an empty folder.

    Yields:
        An empty folder to write to. After an exception it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    part = part_of(path)
    part.mkdir()
    try:
        yield part
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs left while they wrote a file or folder.

    Leftovers of other machines and of processes that still run are kept.

    Args:
        path: Final name of the file or folder.
    """
    if not path.parent.is_dir():
        return
    for entry in list(path.parent.iterdir()):
        match = _PART.fullmatch(entry.name)
        if match is None or match['name'] != path.name or match['host'] != _host():
            continue
        if int(match['pid']) == os.getpid() or _runs(int(match['pid'])):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process of this machine still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
