"""Locks that keep two processes from writing to the same place."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

#: Lock of a folder that is written into.
_IN_FOLDER = '.geofm.lock'


class LockedError(OSError):
    """Another process writes to the same place."""


@contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from writing into a folder.

    The lock is reentrant: a process that holds it may ask for it again. It ends with the process,
    however that ends.

    Args:
        folder: The folder; made if it does not exist.

    Yields:
        Nothing.

    Raises:
        LockedError: If another process holds the lock.
        NotADirectoryError: If there is a file of that name, or of one of its parents.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f'{folder}: a file is in the place of this folder; name another output'
        ) from error
    with _locked(folder / _IN_FOLDER, folder):
        yield


@contextmanager
def locked_name(path: str | os.PathLike[str], wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing a file or folder that is renamed into place.

    Args:
        path: Final name. Missing parent folders are made.
        wait: Whether to wait for another process that holds the lock.

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
            f'{target}: {_holder(file)} is writing there; wait until it has finished, or name '
            'another output'
        ) from None
    try:
        if lock.lock_counter == 1:
            file.write_text(f'{os.getpid()}\n{socket.gethostname()}\n')
        yield
    finally:
        if lock.lock_counter == 1:
            # While it is held: filelock notices when the file it has locked was unlinked.
            file.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    try:
        process, host = file.read_text().splitlines()[:2]
        return f'process {int(process)} on {host}'
    except (OSError, ValueError):
        return 'another process'
