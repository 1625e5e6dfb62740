"""Files that could not be read, counted exactly whoever read them."""

import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path


class FailureLog:
    """A list of files that all processes of this machine add to.

    It is a file, one line a failure: what is appended to a file in one piece is never lost or
    mixed with what others append, so the count is exact without a lock, by fork and by spawn.
    The file goes when the list in the process that made it does.
    """

    def __init__(self) -> None:
        """Initialize a new FailureLog instance."""
        descriptor, name = tempfile.mkstemp(prefix='geofm-failures-', suffix='.txt')
        os.close(descriptor)
        self._file = name
        weakref.finalize(self, _remove, name, os.getpid())

    def add(self, path: str) -> None:
        """Note a file.

        Args:
            path: The file.
        """
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f'{path}\n'.encode())
        finally:
            os.close(descriptor)

    def read(self, start: int = 0) -> list[str]:
        """Files noted so far.

        Args:
            start: Number of those to leave out.

        Returns:
            The others, in the order in which they were noted.
        """
        with suppress(FileNotFoundError):
            return Path(self._file).read_text().splitlines()[start:]
        return []


def _remove(name: str, process: int) -> None:
    """Delete the file, in the process that made it."""
    if os.getpid() == process:
        Path(name).unlink(missing_ok=True)
