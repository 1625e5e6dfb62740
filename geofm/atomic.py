"""Writing files and folders so that a final name never holds something half-written.

Everything is written beside its final name and renamed when it is whole, in the same folder, since
a rename is only atomic within one file system. The temporary name tells who is writing, so that
a later run can remove what a killed one left behind.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from geofm.locking import locked_name

#: ``.{final name}.{host}.{process}.part{suffix of the final name}``, and what libraries append to
#: it for files of their own, such as GDAL's ``.ovr.tmp``.
_PART = re.compile(r'\.(?P<name>.+)\.(?P<host>[^.]*)\.(?P<pid>\d+)\.part(?:\..*)?', re.DOTALL)

#: End of the temporary name of a folder that is being replaced.
_BEFORE = '.before'

#: What a system says of a file that cannot grow.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: A disk with less space than this, in bytes, is full: more than a library writes in one piece.
_SPARE = 2**20


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
def temporary_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Name a file that is only needed for a while.

    Missing parent folders are made. Leftovers of killed runs for the same name are removed.

    Args:
        path: Name that the temporary name is made of, see :func:`part_of`.

    Yields:
        Name to write to. In the end the file is removed, and others whose names start with it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    part = part_of(path)
    try:
        yield part
    finally:
        for entry in _starting_with(part):
            _remove(entry)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file beside its final name and rename it when it is whole.

    Missing parent folders are made. Leftovers of killed runs for the same name are removed. The
    file gets the permissions that the umask gives, whatever the writer chose.

    Args:
        path: Final name.

    Yields:
        Name to write to. After an exception it is removed, and a file that already had the final
        name stays as it was.

    Raises:
        OSError: If the disk is full, even if the writer did not notice or raised another error.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path}: a folder; give the name of a file')
    with temporary_file(path) as part, _naming(path, part):
        mode = _default_mode(part)
        yield part
        _check_space(part)
        with part.open('rb+') as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        part.replace(path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Write a folder beside its final name and rename it when it is whole.

    Meanwhile the name is locked, see :func:`geofm.locking.locked_name`.

    Args:
        path: Final name; it must not exist, or be an empty folder.
        replace: Whether a folder of that name is replaced instead, once the new one is whole.

    Yields:
        An empty folder to write to. After an exception it is removed, and a folder that already had
        the final name stays as it was.

    Raises:
        FileExistsError: If something has the final name that is not to be replaced.
        LockedError: If another process is writing the same folder.
        OSError: If the disk is full, even if the writer did not notice or raised another error.
    """
    path = Path(path).resolve()
    with locked_name(path):
        remove_leftovers(path)
        if path.exists() and not (path.is_dir() and (replace or not any(path.iterdir()))):
            raise FileExistsError(f'{path}: exists already; delete it or give another name')
        part = part_of(path)
        before = part.with_name(part.name + _BEFORE)
        _remove(part)
        try:
            with _naming(path, part):
                part.mkdir()
                yield part
                _check_space(part)
            # A folder that is not empty cannot be replaced in one step.
            if path.exists():
                path.rename(before)
            part.rename(path)
        finally:
            _restore(before, path)
            _remove(part)


def check_not_overwritten(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Refuse to write over a file that is read.

    Args:
        inputs: Files that are read.
        outputs: Files to write.

    Raises:
        FileExistsError: If one is both, under whatever name.
    """
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read:
            raise FileExistsError(
                f'{path}: an input that would be overwritten; name another output, or move the file'
            )


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs left while they wrote a file or folder.

    Leftovers of other machines and of processes that still run are kept. A folder that was about to
    be replaced gets its name back.

    Args:
        path: Final name of the file or folder.
    """
    for entry in _starting_with(path.with_name(f'.{path.name}.{_host()}.')):
        match = _PART.fullmatch(entry.name)
        if match is None or match['name'] != path.name or match['host'] != _host():
            continue
        if int(match['pid']) == os.getpid() or _runs(int(match['pid'])):
            continue
        if entry.name.endswith(_BEFORE):
            _restore(entry, path)
        else:
            _remove(entry)


def _starting_with(path: Path) -> list[Path]:
    """Files and folders whose names start with a name."""
    try:
        with os.scandir(path.parent) as entries:
            return [path.with_name(e.name) for e in entries if e.name.startswith(path.name)]
    except FileNotFoundError:
        return []


def _restore(before: Path, path: Path) -> None:
    """Give a folder its name back, or remove it if another one took its place."""
    if before.exists() and not path.exists():
        before.rename(path)
    _remove(before)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _default_mode(part: Path) -> int:
    """Permissions of a new file, by the umask or the folder's access control list."""
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        # Some writers refuse a file that exists.
        part.unlink()


@contextmanager
def _naming(path: Path, part: Path) -> Iterator[None]:
    """Say that the disk is full where it is, and say the final name rather than the temporary."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename == str(part):
            error.filename = str(path)
        try:
            _check_space(part)
        except OSError as full:
            raise OSError(full.errno, full.strerror, str(path)) from error
        raise


def _check_space(part: Path) -> None:
    """Raise an error if a file, or one in a folder, cannot grow: GDAL and others may not say so.

    Raises:
        OSError: If the disk or the user's share of it is full, or the file as large as can be.
    """
    if not hasattr(os, 'posix_fallocate'):
        return
    probe = part / '.space' if part.is_dir() else part
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666)
        size = os.fstat(descriptor).st_size
        try:
            os.posix_fallocate(descriptor, size, _SPARE)
        finally:
            os.ftruncate(descriptor, size)
            os.close(descriptor)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OSError(error.errno, os.strerror(error.errno), str(part)) from error
    finally:
        if probe != part:
            with suppress(OSError):
                probe.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process of this machine still runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        # A process that has ended stays listed until its parent has asked how.
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return True
