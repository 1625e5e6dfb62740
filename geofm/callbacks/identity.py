"""Identity of a run, stored in its folder and in its checkpoints."""

import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from geofm.atomic import write_atomically
from geofm.checkpoint_io import AtomicCheckpointIO, local_path
from geofm.models.checkpoints import SHARDS_REST, is_sharded

#: Key of the run's id in a checkpoint and in :data:`RUN_FILE`.
KEY = 'run'

#: Name of the file in ``default_root_dir`` that identifies the run.
RUN_FILE = 'geofm_run.json'

_ID = re.compile(r'[0-9a-f]{12}')


class RunIdentity(Callback):
    """Callback that stores the id of the run in ``geofm_run.json`` and in each checkpoint.

    The file is in ``default_root_dir``. A resumed run keeps the id of its checkpoint. Of the
    checkpoints that SLURM requeues leave in that folder, only this run's newest is kept.

    Attributes:
        run: Id of the run, 12 hexadecimal digits.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        """Initialize a new RunIdentity instance.

        Args:
            settings: Settings that distinguish this experiment from others, as JSON values.
        """
        self.run = uuid.uuid4().hex[:12]
        self.settings = dict(settings or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file. At this point the id of a resumed run has been loaded."""
        folder = local_path(trainer.default_root_dir)
        if folder is None or not trainer.is_global_zero:
            return
        write_atomically(
            folder / RUN_FILE, json.dumps({KEY: self.run, 'settings': self.settings}, indent=1)
        )
        remove_requeues(folder, self.run)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the id in the checkpoint."""
        checkpoint[KEY] = self.run

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the id of the run that wrote the checkpoint."""
        self.run = _id(checkpoint.get(KEY)) or self.run


def read_run_file(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Read the id and the settings of the run in a folder.

    Args:
        folder: Folder of a run.

    Returns:
        Id and settings; None if there is no file.

    Raises:
        ValueError: If the file is not one of :class:`RunIdentity`.
    """
    path = folder / RUN_FILE
    try:
        said = json.loads(path.read_text())
        run, settings = _id(said[KEY]), said['settings']
        if run is None or not isinstance(settings, dict):
            raise ValueError
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'{path}: does not identify a run. Remove the file and resume with --ckpt_path'
        ) from error
    return run, settings


def run_of(checkpoint: Path) -> str | None:
    """Read the id of the run that wrote a checkpoint, without reading its tensors.

    Args:
        checkpoint: File, or folder of a sharded checkpoint.

    Returns:
        The id; None if the checkpoint has none or cannot be read.
    """
    path = checkpoint / SHARDS_REST if is_sharded(checkpoint) else checkpoint
    try:
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return _id(content[KEY])
    except Exception:
        # A checkpoint that cannot be read cannot be resumed, whatever the reason.
        return None


def requeue_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints ``hpc_ckpt_*.ckpt``, which are saved after a signal.

    Args:
        folder: Folder of a run.

    Returns:
        The files, newest first.
    """
    numbers = {
        path: int(match[1])
        for path in folder.glob('hpc_ckpt_*.ckpt')
        if (match := re.fullmatch(r'hpc_ckpt_(\d+)\.ckpt', path.name))
    }
    return sorted(numbers, key=numbers.__getitem__, reverse=True)


def remove_requeues(folder: Path, run: str) -> None:
    """Remove all requeue checkpoints of a run except the newest.

    Args:
        folder: Folder of the run.
        run: Id of the run.
    """
    for path in [path for path in requeue_checkpoints(folder) if run_of(path) == run][1:]:
        AtomicCheckpointIO().remove_checkpoint(path)


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) and _ID.fullmatch(value) else None
