"""Choosing the checkpoint that a run resumes from: its own newest one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from geofm.callbacks import RUN_FILE, read_run_file, requeue_checkpoints, run_of

_ADVICE = 'give another --trainer.default_root_dir, or the checkpoint to resume from as --ckpt_path'


def is_requeued() -> bool:
    """Return whether SLURM has started this job before.

    Returns:
        True from the second start on.
    """
    return int(os.environ.get('SLURM_RESTART_COUNT', 0)) > 0


def newest_checkpoint(
    root: Path, folders: Sequence[Path], settings: Mapping[str, Any]
) -> Path | None:
    """Find the newest checkpoint of the run in a folder.

    Args:
        root: Folder of the run, with ``geofm_run.json`` and the ``hpc_ckpt_*.ckpt`` that are
            saved after a signal.
        folders: Folders of other checkpoints of the run.
        settings: Settings that identify the experiment, as plain JSON data.

    Returns:
        The checkpoint; None if there is no run or no checkpoint yet.

    Raises:
        ValueError: If the run in the folder has other settings, or there are checkpoints of an
            unknown run.
    """
    found = [path for folder in folders for path in folder.glob('*.ckpt')]
    # Hidden files are still being written.
    found = [path for path in found if not path.name.startswith('.')] + requeue_checkpoints(root)
    run = require_same_settings(root, settings)
    if run is None:
        if found:
            raise ValueError(
                f'--resume auto: {found[0]} exists, but {root / RUN_FILE}, which identifies its '
                f'run, does not: {_ADVICE}'
            )
        return None
    others = []
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        of = run_of(path)
        if of == run:
            break
        others.append(f'{path} of {"run " + of if of else "an unknown run"}')
    else:
        path = None
    if others:
        more = f' and {len(others) - 1} more' if len(others) > 1 else ''
        rank_zero_warn(f'--resume auto: run {run} does not resume from {others[0]}{more}')
    rank_zero_info(f'--resume auto: run {run} ' + (f'resumes from {path}' if path else 'starts'))
    return path


def require_same_settings(root: Path, settings: Mapping[str, Any]) -> str | None:
    """Check that the run in a folder has the given settings.

    Args:
        root: Folder of the run.
        settings: Settings that identify the experiment, as plain JSON data.

    Returns:
        ID of the run in the folder; None if there is none yet.

    Raises:
        ValueError: If the run in the folder has other settings.
    """
    known = read_run_file(root)
    if known is None:
        return None
    run, before = known
    if changed := next(_differences(before, settings), None):
        name, old, new = changed
        raise ValueError(
            f'--resume auto: {root} is the folder of run {run}, with {name} = {old}, not {new}: '
            f'{_ADVICE}'
        )
    return run


def refuse_requeue_of_another_run(root: Path) -> None:
    """Keep Lightning from resuming another run under SLURM.

    Under SLURM, Lightning resumes from any ``hpc_ckpt_*.ckpt`` in its root folder, whichever run
    wrote it.

    Args:
        root: Folder of the run.

    Raises:
        ValueError: If there is such a file, and the process runs under SLURM.
    """
    paths = requeue_checkpoints(root)
    if paths and SLURMEnvironment.detect():
        raise ValueError(
            f'{paths[0]} is of {"run " + of if (of := run_of(paths[0])) else "an unknown run"}, '
            'but this is a new run. Move the file away, resume that run with --resume auto, '
            f'or {_ADVICE}'
        )


def _differences(before: Any, now: Any, name: str = 'model') -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that differ: their name, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f'{name}.{key}')
    elif before != now:
        yield name, before, now
