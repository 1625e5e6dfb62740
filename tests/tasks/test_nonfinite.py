import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from geofm.cli import main
from geofm.datamodules import SEN12MSCRTSDataModule
from geofm.sen12ms import PairKey
from geofm.tasks.nonfinite import DumpError, replay
from tests.datasets.tree import grid_at, write_pair
from tests.pairs import RandomPairs, RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, small_task, small_trainer


class BrokenPairs(RandomPairsDataModule):
    """The second of four batches has a NaN pixel."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert isinstance(self.train_dataset, RandomPairs)
        self.train_dataset.images[6] = torch.nan

    def files(self, batch: dict[str, Any]) -> list[str]:
        return [f'{int(day)}.tif' for day in batch['dates'][:, 0]]


def test_loss_that_is_not_finite_is_said_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    message = r"loss is not finite at step 1: .*'dino': nan.*nonfinite-step1-rank0\.pt.*17600\.tif"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(small_task(), datamodule=BrokenPairs())
    dump = tmp_path / 'nonfinite-step1-rank0.pt'
    values = replay(dump)
    assert all(torch.tensor(values[name]).isnan() for name in ('dino', 'ibot', 'koleo'))
    assert not list(tmp_path.glob('.*'))

    main(['replay', str(dump)])
    assert 'dino' in capsys.readouterr().out


def test_the_files_of_the_batch_are_named(tmp_path: Path) -> None:
    key = PairKey('ROIs1868', 36, 4, 0)
    s1, s2 = write_pair(tmp_path / 'data', key, grid_at(4326, 7, 47.5))

    class Broken(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.dino_loss.temperature = float('nan')

    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[Broken()])
    with pytest.raises(FloatingPointError) as error:
        trainer.fit(small_task(), SEN12MSCRTSDataModule(str(tmp_path / 'data'), batch_size=1))
    assert str(s1) in str(error.value)
    assert str(s2) in str(error.value)


@pytest.mark.parametrize('centering', ['ema', 'sinkhorn_knopp'])
def test_replay_gives_the_numbers_of_the_step(tmp_path: Path, centering: str) -> None:
    """A step with an infinite gradient is replayed with bit-equal losses."""
    losses: dict[str, float] = {}

    class Explode(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 3:
                losses.update(
                    {
                        name: trainer.callback_metrics[f'train_{name}'].item()
                        for name in ('dino', 'ibot', 'koleo')
                    }
                )
                pl_module.student['dino_head'].last_layer.weight_v.grad[0] = torch.inf

    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[Explode()])
    with pytest.raises(FloatingPointError, match=r'gradient is not finite at step 3: .*: inf'):
        trainer.fit(small_task(centering=centering), datamodule=RandomPairsDataModule())
    values = replay(tmp_path / 'nonfinite-step3-rank0.pt')
    assert {name: values[name] for name in losses} == losses
    assert values['gradient of backbone'] > 0


@pytest.mark.parametrize('bad', ['loss', 'gradient'])
def test_nothing_changes_after_a_bad_step_until_it_is_found(tmp_path: Path, bad: str) -> None:
    """The second of four batches fails, and the host checks after three."""
    states: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if bad == 'gradient' and trainer.global_step == 1:
                pl_module.student['dino_head'].last_layer.weight_v.grad[0] = torch.nan

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            states.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    data = BrokenPairs() if bad == 'loss' else RandomPairsDataModule()
    task = small_task(check_every_n_batches=3, freeze_last_layer_epochs=0)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[Watch()])
    with pytest.raises(FloatingPointError, match=rf'^{bad} is not finite at step 1: '):
        trainer.fit(task, datamodule=data)
    assert len(states) == 2
    for name, value in task.state_dict().items():
        assert value.isfinite().all(), name
        # The teacher still follows the student, which stands still.
        if not name.startswith(('model.', 'teacher_heads.')):
            assert value.equal(states[0][name]), name
    values = replay(tmp_path / 'nonfinite-step1-rank0.pt')
    assert math.isfinite(values['dino']) == (bad == 'gradient')


def test_no_checkpoint_is_written_after_a_bad_step(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[save])
    with pytest.raises(FloatingPointError, match='loss is not finite at step 1: '):
        trainer.fit(small_task(check_every_n_batches=4), datamodule=BrokenPairs())
    assert [path.name for path in tmp_path.glob('*.ckpt')] == ['epoch=0-step=1.ckpt']


def test_looking_seldom_changes_no_number(tmp_path: Path) -> None:
    results = []
    for every in (1, 3):
        seed_everything(0)
        task = small_task(check_every_n_batches=every)
        trainer = small_trainer(
            tmp_path, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=2
        )
        trainer.fit(task, datamodule=RandomPairsDataModule())
        results.append(task.state_dict())
    for name, value in results[0].items():
        assert value.equal(results[1][name]), name


def test_a_file_that_is_no_dump(tmp_path: Path) -> None:
    path = tmp_path / 'x.pt'
    path.write_bytes(b'no')
    with pytest.raises(DumpError, match='not a dump of a training step'):
        replay(path)
    torch.save({'state_dict': {}}, path)
    with pytest.raises(DumpError):
        replay(path)


def test_all_ranks_stop_when_the_loss_of_one_is_not_finite(tmp_path: Path) -> None:
    strategy = DDPStrategy(
        start_method='fork', process_group_backend='gloo', timeout=timedelta(seconds=30)
    )
    trainer = small_trainer(
        tmp_path, max_epochs=1, devices=2, strategy=strategy, limit_val_batches=0
    )
    with pytest.raises(Exception, match=r'loss( of another rank)? is not finite at step \d'):
        trainer.fit(small_task(), datamodule=BrokenPairs())
    dumps = [next(tmp_path.glob(f'nonfinite-step*-rank{rank}.pt')) for rank in range(2)]
    assert sorted(math.isnan(replay(dump)['dino']) for dump in dumps) == [False, True]


def test_a_run_of_the_command_line_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {'accelerator': 'cpu', 'logger': False, 'enable_progress_bar': False}
    config = {
        'trainer': {'max_epochs': 1, 'default_root_dir': str(tmp_path), **quiet},
        'model': {'class_path': 'geofm.tasks.DINOv2', 'init_args': SMALL},
        'data': {'class_path': 'tests.tasks.test_nonfinite.BrokenPairs'},
    }
    path = tmp_path / 'run.yaml'
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match=r'^geofm fit: .*is not finite'):
        main(['fit', '--config', str(path)])
    main(['replay', str(tmp_path / 'nonfinite-step1-rank0.pt')])
    assert 'gradient of backbone' in capsys.readouterr().out
