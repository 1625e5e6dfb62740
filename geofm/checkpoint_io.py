"""Writing Lightning's checkpoints so that a final name never holds half of one."""

import os
import re
from pathlib import Path
from typing import Any, override

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from geofm.atomic import atomic_file, remove_leftovers

# A checkpoint that is being written, see geofm.atomic.
_PARTIAL = re.compile(r'\.(?P<name>.+\.ckpt)\.[^.]*\.\d+\.part\.ckpt')


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, and renames it when it is on the disk.

    Lightning writes to the system's temporary folder and moves the file. If that folder is on
    another file system, moving means copying, and a process that is killed, or a disk that is
    full, leaves part of a checkpoint under the final name.

    ``geofm fit`` uses this by default. In Python: ``Trainer(plugins=[AtomicCheckpointIO()])``.
    Checkpoints that are not on a local file system are written as Lightning does.
    """

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: Final name, or URL.
            storage_options: Not supported, as by Lightning's class.

        Raises:
            TypeError: If *storage_options* is given.
        """
        local = local_path(path)
        if storage_options is not None or local is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(local) as part, part.open('wb') as file:
            torch.save(checkpoint, file)
            # A rename may reach the disk before the data.
            file.flush()
            os.fsync(file.fileno())


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints that killed runs of this machine were writing.

    Args:
        folder: Folder of checkpoints; it need not exist.
    """
    # Names of checkpoints hold the step, so a later run need not write the same name again.
    for entry in folder.glob('.*.part.ckpt'):
        match = _PARTIAL.fullmatch(entry.name)
        if match is not None:
            remove_leftovers(folder / match['name'])


def local_path(path: str | Path) -> Path | None:
    """Path of a file as fsspec understands it.

    Args:
        path: Path, or URL of any protocol.

    Returns:
        The path; None if it is not on a local file system.
    """
    filesystem, stripped = url_to_fs(str(path))
    return Path(stripped) if isinstance(filesystem, LocalFileSystem) else None
