"""Record which files could not be read, across all processes of a machine."""

import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path


class FailureLog:
    """List of files that all processes of a machine append to.

    The list is a file with one line per failure. A line is appended in one write, which is atomic,
    so that the count is exact without a lock, for forked and spawned workers. The file is deleted
    when the process that created it deletes this object.
    """

    def __init__(self) -> None:
        """Initialize a new FailureLog instance."""
        descriptor, name = tempfile.mkstemp(prefix='geofm-failures-', suffix='.txt')
        os.close(descriptor)
        self._file = name
        weakref.finalize(self, _remove, name, os.getpid())

    def add(self, path: str) -> None:
        """Append a file.

        Args:
            path: The file.
        """
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f'{path}\n'.encode())
        finally:
            os.close(descriptor)

    def read(self, start: int = 0) -> list[str]:
        """Return the files recorded so far.

        Args:
            start: Number of files to leave out.

        Returns:
            The remaining files, in order of failure.
        """
        with suppress(FileNotFoundError):
            return Path(self._file).read_text().splitlines()[start:]
        return []


def _remove(name: str, process: int) -> None:
    """Delete the file, if this is the process that created it."""
    if os.getpid() == process:
        Path(name).unlink(missing_ok=True)
