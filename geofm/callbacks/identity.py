"""Which run a folder and a checkpoint are of."""

import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from geofm.atomic import atomic_file
from geofm.checkpoint_io import AtomicCheckpointIO, local_path
from geofm.models.checkpoints.sharded import SHARDS_REST, is_sharded

#: Entry of a checkpoint, and of the file in the folder of a run.
KEY = 'run'

#: File in the folder of a run, which is ``default_root_dir``.
RUN_FILE = 'geofm_run.json'

_ID = re.compile(r'[0-9a-f]{12}')


class RunIdentity(Callback):
    """Writes which run it is to ``geofm_run.json`` in ``default_root_dir`` and to each checkpoint.

    A run that is resumed from a checkpoint stays the same run. Of the checkpoints that SLURM's
    requeues leave in that folder, the newest of this run is kept.

    Attributes:
        run: Id of the run, 12 hexadecimal digits.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        """Initialize a new RunIdentity instance.

        Args:
            settings: What tells an experiment from another, as JSON can hold it.
        """
        self.run = uuid.uuid4().hex[:12]
        self.settings = dict(settings or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, once it is known whether the run is resumed."""
        folder = local_path(trainer.default_root_dir)
        if folder is None or not trainer.is_global_zero:
            return
        with atomic_file(folder / RUN_FILE) as part:
            part.write_text(json.dumps({KEY: self.run, 'settings': self.settings}, indent=1))
        remove_requeues(folder, self.run)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say which run the checkpoint is of."""
        checkpoint[KEY] = self.run

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on as the run that wrote the checkpoint."""
        self.run = _id(checkpoint.get(KEY)) or self.run


def read_run_file(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Run of a folder.

    Args:
        folder: Folder of a run.

    Returns:
        Its id and settings; None if there is no file.

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
            f'{path}: does not say which run the folder is of. Remove it, and resume with '
            '--ckpt_path'
        ) from error
    return run, settings


def run_of(checkpoint: Path) -> str | None:
    """Run that wrote a checkpoint. Its tensors are not read.

    Args:
        checkpoint: The file, or the folder of a sharded one.

    Returns:
        The id; None if it does not say, or cannot be read.
    """
    path = checkpoint / SHARDS_REST if is_sharded(checkpoint) else checkpoint
    try:
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return _id(content[KEY])
    except Exception:
        # Whatever is wrong with it: it cannot be resumed from.
        return None


def requeue_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that Lightning writes when SLURM asks a job to make way.

    Args:
        folder: Folder of a run.

    Returns:
        The files, the newest first.
    """
    numbers = {
        path: int(match[1])
        for path in folder.glob('hpc_ckpt_*.ckpt')
        if (match := re.fullmatch(r'hpc_ckpt_(\d+)\.ckpt', path.name))
    }
    return sorted(numbers, key=numbers.__getitem__, reverse=True)


def remove_requeues(folder: Path, run: str) -> None:
    """Remove a run's checkpoints of requeues but the newest.

    Args:
        folder: Folder of the run.
        run: Its id.
    """
    for path in [path for path in requeue_checkpoints(folder) if run_of(path) == run][1:]:
        AtomicCheckpointIO().remove_checkpoint(path)


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) and _ID.fullmatch(value) else None
