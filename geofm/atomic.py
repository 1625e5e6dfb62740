"""Atomic writing: a file or folder appears under its final name only when it is complete.

It is written under a temporary name and then renamed. The temporary name is in the same folder,
since renaming is only atomic within a file system. It contains the host and process ID, so that a
later run can remove the leftovers of a killed one.
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

#: ``.{final name}.{host}.{process ID}.part{suffix of the final name}``, followed by whatever
#: libraries append for their own temporary files, such as GDAL's ``.ovr.tmp``.
_PART = re.compile(r'\.(?P<name>.+)\.(?P<host>[^.]*)\.(?P<pid>\d+)\.part(?:\..*)?', re.DOTALL)

#: Suffix of the temporary name of a folder that is being replaced.
_BEFORE = '.before'

#: Error numbers for a file that cannot grow.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: Free space below which a disk is considered full, in bytes. Larger than what libraries write in
#: one piece.
_SPARE = 2**20


def _host() -> str:
    """Return the name of this machine, without dots."""
    return re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())


def part_of(path: Path) -> Path:
    """Return the temporary name of a file or folder that this process writes.

    Args:
        path: Final name.

    Returns:
        A hidden name in the same folder, with the same suffix, since GDAL, NumPy and others choose
        the format by the suffix.
    """
    return path.with_name(f'.{path.name}.{_host()}.{os.getpid()}.part{path.suffix}')


@contextmanager
def temporary_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager for a temporary file.

    Missing parent folders are created. Leftovers of killed runs for the same name are removed.

    Args:
        path: Name that the temporary name is derived from, see :func:`part_of`.

    Yields:
        Temporary name to write to. On exit, the file and all files whose names start with this name
        are removed.
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
    """Write a file under a temporary name and rename it when it is complete.

    Missing parent folders are created. Leftovers of killed runs for the same name are removed. The
    permissions of the file follow the umask, whatever the writer sets.

    Args:
        path: Final name.

    Yields:
        Temporary name to write to. After an exception it is removed, and an existing file with the
        final name is left unchanged.

    Raises:
        OSError: If the disk is full, even if the writer ignores that or raises another error.
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


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as :func:`atomic_file` does.

    Args:
        path: Final name.
        text: The text.

    Raises:
        OSError: If the disk is full.
    """
    with atomic_file(path) as part:
        part.write_text(text)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Write a folder under a temporary name and rename it when it is complete.

    Meanwhile the final name is locked, see :func:`geofm.locking.locked_name`.

    Args:
        path: Final name. It must not exist, or must be an empty folder, unless *replace* is set.
        replace: Whether to replace an existing folder once the new one is complete.

    Yields:
        An empty folder to write to. After an exception it is removed, and an existing folder with
        the final name is left unchanged.

    Raises:
        FileExistsError: If the final name exists and must not be replaced.
        LockedError: If another process is writing the same folder.
        OSError: If the disk is full, even if the writer ignores that or raises another error.
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
            # A non-empty folder cannot be replaced in a single step.
            if path.exists():
                path.rename(before)
            part.rename(path)
        finally:
            _restore(before, path)
            _remove(part)


def check_not_overwritten(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Check that no input file would be overwritten.

    Args:
        inputs: Files to read.
        outputs: Files to write.

    Raises:
        FileExistsError: If a file is both an input and an output, also through a link.
    """
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read:
            raise FileExistsError(
                f'{path}: this input would be overwritten; choose another output, or move the file'
            )


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed runs left while they were writing a file or folder.

    Those of other machines and of running processes are kept. A folder that was about to be
    replaced is renamed back.

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
    """Return the files and folders whose names start with the name of *path*."""
    try:
        with os.scandir(path.parent) as entries:
            return [path.with_name(e.name) for e in entries if e.name.startswith(path.name)]
    except FileNotFoundError:
        return []


def _restore(before: Path, path: Path) -> None:
    """Rename a folder back, or remove it if its name has been taken."""
    if before.exists() and not path.exists():
        before.rename(path)
    _remove(before)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _default_mode(part: Path) -> int:
    """Return the permissions of a new file, given by the umask or access control list."""
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        # Some writers refuse to write to an existing file.
        part.unlink()


@contextmanager
def _naming(path: Path, part: Path) -> Iterator[None]:
    """Report a full disk if it is the cause of an error, and the final name of the file."""
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
    """Check that a file, or a new file in a folder, can grow, since GDAL and others may not do so.

    Raises:
        OSError: If the disk is full, or the disk quota or the maximum file size is reached.
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
    """Return whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        # A process that has ended is a zombie until its parent has read its exit code.
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return True
