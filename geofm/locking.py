"""Locks that keep processes from writing to the same file or folder at the same time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

#: Name of the lock file in a locked folder.
_IN_FOLDER = '.geofm.lock'


class LockedError(OSError):
    """Another process is writing to the same file or folder."""


@contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from writing into a folder.

    The lock is reentrant: a process that holds it can acquire it again. It is released when the
    process ends, even if it is killed.

    Args:
        folder: The folder; created if it does not exist.

    Yields:
        Nothing.

    Raises:
        LockedError: If another process holds the lock.
        NotADirectoryError: If the folder or one of its parents is a file.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f'{folder}: not a folder but a file; choose another output'
        ) from error
    with _locked(folder / _IN_FOLDER, folder):
        yield


@contextmanager
def locked_name(path: str | os.PathLike[str], wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing a file or folder of this name.

    Args:
        path: Final name. Missing parent folders are created.
        wait: Whether to wait while another process holds the lock.

    Yields:
        Nothing.

    Raises:
        LockedError: If another process holds the lock, unless *wait* is set.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f'.{path.name}.lock'), path, wait):
        yield


@contextmanager
def _locked(file: Path, target: Path, wait: bool = False) -> Iterator[None]:
    lock = FileLock(file.absolute(), blocking=False, is_singleton=True, thread_local=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise LockedError(
            f'{target}: {_holder(file)} is writing there; wait until it has finished, or choose '
            'another output'
        ) from None
    try:
        if lock.lock_counter == 1:
            file.write_text(f'{os.getpid()}\n{socket.gethostname()}\n')
        yield
    finally:
        if lock.lock_counter == 1:
            # Before the release: filelock detects that a locked file has been removed.
            file.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    try:
        process, host = file.read_text().splitlines()[:2]
        return f'process {int(process)} on {host}'
    except (OSError, ValueError):
        return 'another process'
