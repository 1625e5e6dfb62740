"""Atomic writing and safe reading of Lightning's checkpoints."""

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
from geofm.models.checkpoints import is_sharded, read_sharded

# Names of checkpoints that are being written, or folders that are being replaced.
_PARTIAL = re.compile(r'\.(?P<name>.+\.ckpt)\.[^.]*\.\d+\.part\.ckpt(\.before)?')


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes atomically and loads plain values only.

    A checkpoint is written to a temporary file in its folder and then renamed. Lightning instead
    writes to the system's temporary folder and moves the file. If that folder is on another file
    system, the move is a copy, and a killed process or a full disk leaves a partial checkpoint
    under the final name.

    ``geofm fit`` uses this plugin by default. In Python, use
    ``Trainer(plugins=[AtomicCheckpointIO()])``. Checkpoints on remote file systems are written by
    Lightning. Loading creates no objects from the file unless ``weights_only=False`` is given.
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
            path: Path or URL of a file, or the folder of a sharded checkpoint.
            map_location: As for :func:`torch.load`.
            weights_only: Whether to read tensors and plain values only. None: True, unlike in
                Lightning.

        Returns:
            The checkpoint.

        Raises:
            ValueError: If the checkpoint contains other objects.
        """
        try:
            if (local := local_path(path)) is not None and is_sharded(local):
                return read_sharded(local, optimizers=True)
            plain = weights_only is not False
            return super().load_checkpoint(path, map_location, weights_only=plain)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f'{path}: holds more than tensors and plain values, or is damaged. Loading other '
                'objects may run code: give --weights_only false only if you trust the file'
            ) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint.

        Args:
            path: Path or URL.
        """
        local = local_path(path)
        if local is not None and local.is_dir() and not local.is_symlink():
            # If the process is killed, the remains must not look like a checkpoint.
            path = local.rename(part_of(local))
        super().remove_checkpoint(path)


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove partial checkpoints of killed runs on this machine.

    Args:
        folder: Folder of checkpoints. It need not exist.
    """
    # Names of checkpoints have the step, so later runs do not overwrite partial ones.
    for entry in folder.glob('.*.part.ckpt*'):
        match = _PARTIAL.fullmatch(entry.name)
        if match is not None:
            remove_leftovers(folder / match['name'])


def local_path(path: str | Path) -> Path | None:
    """Return the local path of a path or URL.

    Args:
        path: Path, or URL of any protocol that fsspec supports.

    Returns:
        The path; None if it is not on a local file system.
    """
    filesystem, stripped = url_to_fs(str(path))
    return Path(stripped) if isinstance(filesystem, LocalFileSystem) else None
