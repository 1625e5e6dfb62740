"""`--resume auto`: a run only resumes from its own newest checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from geofm.callbacks.identity import remove_requeues
from geofm.commands.fit import _run_folders
from geofm.commands.resume import newest_checkpoint, refuse_requeue_of_another_run
from geofm.messages import CommandError
from tests.test_checkpoint_io import fit, sample

__all__ = ('sample',)

OURS, OTHER = 'a' * 12, 'b' * 12
SETTINGS: dict[str, Any] = {'class_path': 'DINOv2', 'init_args': {'lr': 0.1, 'bands': ['VV']}}


def write(path: Path, run: object, age: float) -> Path:
    """Write a checkpoint that is *age* seconds old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'state_dict': {'w': torch.ones(9)}, **({} if run is None else {'run': run})}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / 'geofm_run.json').write_text(json.dumps({'run': OURS, 'settings': SETTINGS}))
    return tmp_path


def test_the_newest_of_this_run_whoever_wrote_it(root: Path) -> None:
    folders = [root / 'checkpoints']
    assert newest_checkpoint(root, folders, SETTINGS) is None
    requeue = write(root / 'hpc_ckpt_2.ckpt', OURS, age=30)
    assert newest_checkpoint(root, folders, SETTINGS) == requeue
    # Lightning would resume from the requeue checkpoint even if there is a newer checkpoint.
    later = write(root / 'checkpoints' / 'epoch=1.ckpt', OURS, age=20)
    assert newest_checkpoint(root, folders, SETTINGS) == later
    write(root / 'checkpoints' / '.last.ckpt.host.7.part.ckpt', OURS, age=1)
    assert newest_checkpoint(root, folders, SETTINGS) == later
    newest = write(root / 'hpc_ckpt_10.ckpt', OURS, age=10)
    assert newest_checkpoint(root, folders, SETTINGS) == newest
    remove_requeues(root, OURS)
    assert newest.exists()
    assert not requeue.exists()


def test_checkpoints_of_others_are_left_aside_and_said(root: Path) -> None:
    ours = write(root / 'checkpoints' / 'last.ckpt', OURS, age=20)
    other = write(root / 'hpc_ckpt_1.ckpt', OTHER, age=10)
    write(root / 'checkpoints' / 'odd.ckpt', ['run'], age=9)
    (root / 'checkpoints' / 'broken.ckpt').write_bytes(b'PK')
    with pytest.warns(UserWarning, match=r'does not resume from .*broken.ckpt of an unkn.* 2 more'):
        assert newest_checkpoint(root, [root / 'checkpoints'], SETTINGS) == ours
    remove_requeues(root, OURS)
    assert other.exists()


def test_another_experiment_in_the_same_folder_is_refused(root: Path) -> None:
    write(root / 'checkpoints' / 'last.ckpt', OURS, age=20)
    changed = {**SETTINGS, 'init_args': {'lr': 0.2, 'bands': ['VV']}}
    message = f'is the folder of run {OURS}, with model.init_args.lr = 0.1, not 0.2: give another'
    with pytest.raises(ValueError, match=message):
        newest_checkpoint(root, [root / 'checkpoints'], changed)
    (root / 'geofm_run.json').unlink()
    with pytest.raises(ValueError, match=r'last.ckpt exists, but .*run.json'):
        newest_checkpoint(root, [root / 'checkpoints'], SETTINGS)
    (root / 'geofm_run.json').write_text('{"run": "../x", "settings": {}}')
    with pytest.raises(ValueError, match=r'run.json: does not identify a run'):
        newest_checkpoint(root, [root / 'checkpoints'], SETTINGS)


def test_lightning_must_not_take_up_an_old_requeue(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / 'hpc_ckpt_1.ckpt', OTHER, age=10)
    refuse_requeue_of_another_run(root)
    monkeypatch.setattr(SLURMEnvironment, 'detect', lambda: True)
    with pytest.raises(ValueError, match=f'hpc_ckpt_1.ckpt is of run {OTHER}, but this is a new'):
        refuse_requeue_of_another_run(root)


def test_runs_side_by_side_do_not_see_each_other(tmp_path: Path) -> None:
    """Without a logger, checkpoints are directly in the folder of a run."""
    for run in ('a', 'b'):
        write(tmp_path / run / 'lightning_logs' / 'version_0' / 'checkpoints' / 'x.ckpt', OURS, 1)
        write(tmp_path / run / 'checkpoints' / 'x.ckpt', OURS, 1)
    trainer = Trainer(accelerator='cpu', logger=False, default_root_dir=tmp_path / 'a')
    assert _run_folders(trainer) == [tmp_path / 'a' / 'checkpoints']
    trainer = Trainer(accelerator='cpu', logger=True, default_root_dir=tmp_path / 'a')
    logs = tmp_path / 'a' / 'lightning_logs'
    assert _run_folders(trainer) == [logs / f'version_{i}' / 'checkpoints' for i in (1, 0)]


def test_the_command_resumes_its_run(
    sample: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run starts, resumes in a new log folder, and is refused with other settings."""

    def run(*args: str) -> list[dict[str, Any]]:
        arguments = [
            '--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint',
            '--trainer.callbacks.every_n_train_steps=1',
            '--trainer.callbacks.save_top_k=-1',
            # The epoch must not end, since there is no validation.
            '--data.init_args.batch_size=1',
            *args,
        ]
        fit(sample, tmp_path, *arguments)
        paths = sorted(tmp_path.rglob('*.ckpt'), key=lambda path: path.stat().st_mtime_ns)
        return [torch.load(path, weights_only=True) for path in paths]

    first = run('--trainer.max_steps=2', '--resume=auto')
    assert [checkpoint['global_step'] for checkpoint in first] == [1, 2]
    second = run('--trainer.max_steps=3', '--resume=auto')
    assert [checkpoint['global_step'] for checkpoint in second] == [1, 2, 3]
    assert {checkpoint['run'] for checkpoint in second} == {first[0]['run']}
    with pytest.raises(CommandError):
        run('--trainer.max_steps=4', '--resume=auto', '--model.init_args.lr=0.5')
    assert 'model.init_args.lr = 0.0003, not 0.5: give another' in capfd.readouterr().err
    with monkeypatch.context() as requeued:
        requeued.setenv('SLURM_RESTART_COUNT', '1')
        fourth = run('--trainer.max_steps=4')
    assert [checkpoint['global_step'] for checkpoint in fourth] == [1, 2, 3, 4]
    # A new experiment in the same folder is another run.
    third = run('--trainer.max_steps=1')
    assert third[-1]['global_step'] == 1
    assert third[-1]['run'] != first[0]['run']
    with pytest.raises(CommandError):
        run('--resume=auto', '--ckpt_path=last')
