"""Lightning's checkpoints: a final name never holds half of one, and none creates objects."""

import os
import pickle
import re
from pathlib import Path
from typing import Any, override

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from geofm.atomic import atomic_file, part_of, remove_leftovers
from geofm.models.checkpoints.sharded import is_sharded, read_sharded

# A checkpoint that is being written, or a folder that is being replaced, see geofm.atomic.
_PARTIAL = re.compile(r'\.(?P<name>.+\.ckpt)\.[^.]*\.\d+\.part\.ckpt(\.before)?')


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, and renames it when it is on the disk.

    Lightning writes to the system's temporary folder and moves the file. If that folder is on
    another file system, moving means copying, and a process that is killed, or a disk that is
    full, leaves part of a checkpoint under the final name.

    ``geofm fit`` uses this by default. In Python: ``Trainer(plugins=[AtomicCheckpointIO()])``.
    Checkpoints that are not on a local file system are written as Lightning does. Loading one
    creates no object out of it, unless ``weights_only=False`` is given.
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

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: Path or URL; or the folder of a sharded checkpoint, which is put together.
            map_location: As of :func:`torch.load`.
            weights_only: Whether to read tensors and plain values only; None: yes, where
                Lightning's class says no.

        Returns:
            The checkpoint.

        Raises:
            ValueError: If it holds other objects.
        """
        try:
            if (local := local_path(path)) is not None and is_sharded(local):
                return read_sharded(local, optimizers=True)
            plain = weights_only is not False
            return super().load_checkpoint(path, map_location, weights_only=plain)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f'{path}: holds more than tensors and plain values, or is damaged. Loading the '
                'rest may run code: only if you trust the file, give --weights_only false'
            ) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint.

        Args:
            path: Path or URL.
        """
        local = local_path(path)
        if local is not None and local.is_dir() and not local.is_symlink():
            # What is left of a folder when a process is killed must not look like a checkpoint.
            path = local.rename(part_of(local))
        super().remove_checkpoint(path)


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints that killed runs of this machine were writing.

    Args:
        folder: Folder of checkpoints; it need not exist.
    """
    # Names of checkpoints hold the step, so a later run need not write the same name again.
    for entry in folder.glob('.*.part.ckpt*'):
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
