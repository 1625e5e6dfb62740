import errno
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from geofm.checkpoint_io import AtomicCheckpointIO, remove_partial_checkpoints
from geofm.cli import main
from geofm.datasets import write_sample_data
from geofm.messages import CommandError

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = {'state_dict': {'weight': torch.arange(100_000.0)}}


@pytest.fixture
def _two_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a temporary folder on another file system than the run."""
    temporary = tmp_path / 'tmp'
    temporary.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(temporary))

    def one_system(move: Callable[..., None]) -> Callable[..., None]:
        def renamed(src: Any, dst: Any, **kwargs: Any) -> None:
            if (temporary in Path(src).parents) != (temporary in Path(dst).parents):
                raise OSError(errno.EXDEV, 'Invalid cross-device link')
            move(src, dst, **kwargs)

        return renamed

    for name in ('rename', 'replace', 'link'):
        monkeypatch.setattr(os, name, one_system(getattr(os, name)))


def _killed_while_writing(path: Path, kind: type[TorchCheckpointIO]) -> None:
    """Write a checkpoint in a process that is killed after half of the bytes."""

    def save(checkpoint: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        with tempfile.TemporaryFile() as whole:
            original(checkpoint, whole)
            size = whole.tell()
            whole.seek(0)
            content = whole.read(size)
        # A path, or a file object.
        with open(file, 'wb') if isinstance(file, str | Path) else file as target:  # noqa: PTH123
            target.write(content[: size // 2])
            target.flush()
            if isinstance(target.fileno(), int):
                os.kill(os.getpid(), signal.SIGKILL)

    def copy(src: Any, dst: Any, *args: Any, **kwargs: Any) -> None:
        """Do what shutil.move does between file systems."""
        content = Path(src).read_bytes()
        Path(dst).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    original = torch.save
    if kind is AtomicCheckpointIO:
        torch.save = save  # type: ignore[assignment]
    shutil.copy2 = shutil.copyfile = copy  # type: ignore[assignment]
    kind().save_checkpoint(CHECKPOINT, path)


def _kill(path: Path, kind: type[TorchCheckpointIO]) -> None:
    process = get_context('fork').Process(target=_killed_while_writing, args=(path, kind))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.usefixtures('_two_file_systems')
def test_a_killed_write_leaves_the_last_checkpoint_intact(tmp_path: Path) -> None:
    folder = tmp_path / 'run' / 'checkpoints'
    path = folder / 'epoch=1-step=20.ckpt'
    _kill(path, AtomicCheckpointIO)
    assert not path.exists()
    (left,) = folder.iterdir()
    assert left.stat().st_size > 100_000
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    whole = path.read_bytes()
    _kill(path, AtomicCheckpointIO)
    assert path.read_bytes() == whole
    remove_partial_checkpoints(folder)
    assert [p.name for p in folder.iterdir()] == [path.name]
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded['state_dict']['weight'], CHECKPOINT['state_dict']['weight'])


@pytest.mark.usefixtures('_two_file_systems')
def test_lightning_alone_leaves_half_a_checkpoint(tmp_path: Path) -> None:
    """The reason for AtomicCheckpointIO. When this test fails, it is no longer needed."""
    path = tmp_path / 'run' / 'last.ckpt'
    _kill(path, TorchCheckpointIO)
    assert path.exists()
    with pytest.raises(RuntimeError, match=r'zip|PytorchStreamReader'):
        torch.load(path, weights_only=True)


def test_files_being_written_by_another_process_are_kept(tmp_path: Path) -> None:
    own = tmp_path / f'.last.ckpt.{"other-machine"}.1.part.ckpt'
    own.touch()
    (tmp_path / '.notes.part.ckpt').touch()
    remove_partial_checkpoints(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_url_is_left_to_lightning() -> None:
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, 'memory://run/last.ckpt')
    assert 'state_dict' in AtomicCheckpointIO().load_checkpoint('memory://run/last.ckpt')
    with pytest.raises(TypeError, match='storage_options'):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, 'last.ckpt', {})


@pytest.fixture(scope='module')
def sample(module_path: Path) -> Path:
    """Data, and a small model beside them."""
    path = module_path / 'sample'
    write_sample_data(path, patches_per_roi=1, time_steps=1, size=64)
    model: dict[str, Any] = {'architecture': 'geofm_vit_nano_patch16_linear', 'pretrained_cfg': {}}
    path.with_name('model').mkdir()
    model['model_args'] = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
    (path.with_name('model') / 'config.json').write_text(json.dumps(model))
    return path


def fit(sample: Path, root: Path, *args: str) -> None:
    main(
        [
            'fit',
            f'--config={ROOT}/configs/finetune/classification.yaml',
            f'--data.init_args.paths={sample}',
            '--data.init_args.batch_size=4',
            '--data.init_args.window=16',
            f'--model.init_args.model=local-dir:{sample.with_name("model")}',
            f'--trainer.default_root_dir={root}',
            '--trainer.accelerator=cpu',
            '--trainer.enable_progress_bar=false',
            '--trainer.limit_val_batches=0',
            *args,
        ]
    )


def test_sigterm_saves_a_checkpoint_and_fails(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / 'lightning_logs' / 'version_0' / 'checkpoints' / '.last.ckpt'
    left = left.with_name(
        f'.last.ckpt.{os.uname().nodename.replace(".", "-")}.{2**22 + 1}.part.ckpt'
    )
    left.parent.mkdir(parents=True)
    left.touch()

    def terminate(self: Any, *args: Any) -> None:
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr('torchgeo.tasks.BaseTask.on_train_batch_start', terminate, raising=False)
    with pytest.raises(CommandError, match='geofm fit: stopped by SIGTERM') as stopped:
        fit(sample, tmp_path, '--data.init_args.batch_size=1')
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not left.exists()
    (checkpoint,) = tmp_path.rglob('*.ckpt')
    assert checkpoint == tmp_path / 'hpc_ckpt_1.ckpt'
    # The current step is completed.
    assert torch.load(checkpoint, weights_only=True)['global_step'] == 2
    (config,) = tmp_path.rglob('config.yaml')
    assert 'num_classes: 8' in config.read_text()


def test_the_command_line_writes_checkpoints_atomically(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []

    def train(self: Trainer, **kwargs: Any) -> None:
        seen.append(type(self.strategy.checkpoint_io))

    monkeypatch.setattr(Trainer, 'fit', train)
    monkeypatch.setattr('geofm.commands.fit.GeofmCLI.after_fit', lambda self: None)
    fit(sample, tmp_path)
    plugin = 'lightning.pytorch.plugins.io.AsyncCheckpointIO'
    fit(sample, tmp_path, f'--trainer.plugins={plugin}')
    assert seen[0] is AtomicCheckpointIO
    assert seen[1].__name__ == 'AsyncCheckpointIO'


class _Marker:
    """Object with a visible side effect when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_loading_does_not_create_arbitrary_objects(tmp_path: Path) -> None:
    path, mark = tmp_path / 'hostile.ckpt', tmp_path / 'mark'
    torch.save({**CHECKPOINT, 'callbacks': _Marker(mark)}, path)
    with pytest.raises(ValueError, match=r'hostile\.ckpt: holds more than tensors'):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not mark.exists()
    AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert mark.exists()
