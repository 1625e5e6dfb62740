"""Resuming with another batch size, and epochs that are not passes over the data."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from geofm.datamodules.resumable import ResumableDataModule
from tests.pairs import RandomPairs, RandomPairsDataModule
from tests.tasks.test_dinov2 import small_task, small_trainer
from tests.tasks.test_reproducible import StopAt

#: Samples of an epoch.
LENGTH = 24


class Numbered(RandomPairs):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {'index': torch.tensor(int(index))}


class ResumablePairs(ResumableDataModule):
    """Random pairs with geofm's loaders."""

    def __init__(self, batch_size: int, length: int = LENGTH) -> None:
        super().__init__(RandomPairs, batch_size)
        self.seed, self.length = 0, length
        self.aug = lambda batch: batch

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_dataset = Numbered(self.length)

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.train_dataset is not None
        return self._training_loader(self.train_dataset, self.batch_size)


class Watch(Callback):
    """Schedules and samples of each step."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.lrs: list[float] = []
        self.samples: list[tuple[int, list[int]]] = []
        self.states: list[dict[str, int]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        self.lrs.append(max(group['lr'] for group in trainer.optimizers[0].param_groups))
        self.values.append(
            {k[9:]: float(v) for k, v in trainer.callback_metrics.items() if 'schedule' in k}
        )
        if 'index' in batch:
            self.samples.append((trainer.current_epoch, batch['index'].tolist()))
            self.states.append(trainer.datamodule.state_dict())


class Halfway(Callback):
    """Save and stop a run at the end of its second epoch."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True


def fit(path: Path, data: Any, *callbacks: Callback, epochs: int = 4, **kwargs: Any) -> Watch:
    seed_everything(0)
    watch = Watch()
    accumulate = kwargs.pop('accumulate', 1)
    options = kwargs.pop('options', {})
    trainer: Trainer = small_trainer(
        path,
        max_epochs=epochs,
        callbacks=[watch, *callbacks],
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(small_task(scale_lr=False, lr=1e-3), datamodule=data, **kwargs)
    return watch


@pytest.fixture(scope='module')
def half(module_path: Path) -> Path:
    """Run two of four epochs with batches of 4."""
    fit(module_path, RandomPairsDataModule(4, LENGTH), Halfway(module_path / 'half.ckpt'))
    return module_path / 'half.ckpt'


@pytest.mark.parametrize(
    ('size', 'accumulate', 'steps'), [(4, 1, 12), (8, 1, 6), (2, 1, 24), (4, 2, 6), (2, 2, 12)]
)
def test_schedules_go_by_samples(
    tmp_path: Path, half: Path, size: int, accumulate: int, steps: int
) -> None:
    """Schedules continue at half of the run and end at its end, for any batch size."""
    data = RandomPairsDataModule(size, LENGTH)
    watch = fit(tmp_path, data, accumulate=accumulate, ckpt_path=half, weights_only=True)
    used = watch.lrs[::accumulate] if accumulate > 1 else watch.lrs
    assert len(used) == steps
    # A quarter of the run is warm-up: two thirds of the cosine are to come.
    share = 1 / 3 + (2 / 3) * torch.arange(steps) / steps
    cosine = (1 + torch.cos(torch.pi * share)) / 2
    expected = 1e-6 + (1e-3 - 1e-6) * cosine
    torch.testing.assert_close(torch.tensor(used), expected, rtol=1e-4, atol=1e-9)
    risen = (1 - torch.cos(torch.pi * (0.5 + 0.5 * torch.arange(steps) / steps))) / 2
    momenta = torch.tensor([values['momentum'] for values in watch.values])[::accumulate]
    torch.testing.assert_close(momenta, 0.992 + 0.008 * risen, rtol=1e-5, atol=0)


def test_a_run_of_another_length_says_so(tmp_path: Path, half: Path) -> None:
    data = RandomPairsDataModule(4, LENGTH)
    with pytest.warns(UserWarning, match='96 samples, of which 48 are done, and now has 72'):
        watch = fit(tmp_path, data, epochs=3, ckpt_path=half, weights_only=True)
    assert len(watch.lrs) == 6
    assert watch.lrs[0] == pytest.approx(5e-4, rel=0.01)


def test_a_run_is_resumed_after_the_last_batch_of_an_epoch_and_again(tmp_path: Path) -> None:
    """Resume from a checkpoint at the end of an epoch, then from one within the next."""
    whole = fit(tmp_path, ResumablePairs(4), epochs=3)
    checkpoint: Path | None = None
    for step in (6, 9, 16):
        stop = StopAt(step, tmp_path / f'{step}.ckpt')
        fit(tmp_path, ResumablePairs(4), stop, epochs=3, ckpt_path=checkpoint, weights_only=True)
        checkpoint = stop.checkpoint
        state = torch.load(checkpoint, weights_only=True)
        assert state['loops']['fit_loop']['epoch_progress']['current']['started'] == -(-step // 6)
    rest = fit(tmp_path, ResumablePairs(4), epochs=3, ckpt_path=checkpoint, weights_only=True)
    assert rest.samples == whole.samples[16:]
    assert rest.lrs == whole.lrs[16:]


@pytest.fixture(scope='module')
def middle(module_path: Path) -> tuple[Watch, Path]:
    """A run that was stopped within its second epoch, and its checkpoint."""
    checkpoint = module_path / 'middle.ckpt'
    return fit(module_path, ResumablePairs(4), StopAt(9, checkpoint), epochs=3), checkpoint


@pytest.mark.parametrize('size', [4, 6, 8, 2])
def test_an_epoch_goes_on_in_batches_of_another_size(
    tmp_path: Path, middle: tuple[Watch, Path], size: int
) -> None:
    """Every sample is seen once in the resumed epoch and in the following ones."""
    before, checkpoint = middle
    seen = [n for epoch, batch in before.samples if epoch == 1 for n in batch]
    assert len(seen) == 12
    after = fit(tmp_path, ResumablePairs(size), epochs=3, ckpt_path=checkpoint, weights_only=True)
    rest = [n for epoch, batch in after.samples if epoch == 1 for n in batch]
    left_out = (LENGTH - 12) % size
    assert len({*seen, *rest}) == LENGTH - left_out
    assert len(seen) + len(rest) == LENGTH - left_out
    assert sorted(n for epoch, batch in after.samples if epoch == 2 for n in batch) == list(
        range(LENGTH)
    )
    starts = [state['start'] for state in after.states if state['epoch'] == 1]
    assert starts[:1] == [12 + size] or len(rest) == size


class KeepWatch(Callback):
    """Save the samples that each rank has seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (watch,) = (c for c in trainer.callbacks if isinstance(c, Watch))
        kept = {name: getattr(watch, name) for name in ('lrs', 'values', 'samples')}
        torch.save(kept, self.folder / f'{trainer.global_rank}.pt')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_an_epoch_goes_on_with_other_ranks_and_batches(tmp_path: Path) -> None:
    """2 ranks x 4, then 1 x 3, then 2 x 4: each sample once, with unchanged schedules."""
    seen: list[tuple[int, int]] = []
    found: list[tuple[int, float, float]] = []
    kwargs: dict[str, Any] = {}
    # Ranks, batch, and the optimiser step to stop at: after 8 samples, and after 24 more.
    for ranks, size, stop in ((2, 4, 1), (1, 3, 9), (2, 4, 99)):
        folder = tmp_path / str(stop)
        folder.mkdir()
        last = StopAt(stop, folder / 'last.ckpt')
        options = {'strategy': 'ddp_fork', 'devices': 2} if ranks == 2 else {}
        data = ResumablePairs(size, 48)
        fit(folder, data, last, KeepWatch(folder), epochs=2, options=options, **kwargs)
        parts = [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(ranks)]
        done = len(seen)
        for part in parts:
            seen += [(epoch, n) for epoch, batch in part['samples'] for n in batch]
        steps = zip(parts[0]['lrs'], parts[0]['values'], strict=True)
        for step, (lr, values) in enumerate(steps):
            found.append((done + step * ranks * size, lr, values['momentum']))
        kwargs = {'ckpt_path': last.checkpoint, 'weights_only': True}
    assert sorted(seen) == [(epoch, n) for epoch in range(2) for n in range(48)]
    assert [samples for samples, *_ in found] == [0, *range(8, 32, 3), *range(32, 96, 8)]
    for samples, lr, momentum in found:
        # An unbroken run has 12 steps of 8 samples, of which 6 are warm-up.
        place = samples / 8
        cosine = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (place - 6) / 6)) / 2
        assert lr == pytest.approx(1e-3 * place / 5 if place <= 5 else cosine, rel=1e-6)
        risen = (1 + math.cos(math.pi * place / 12)) / 2
        assert momentum == pytest.approx(1 - 0.008 * risen, rel=1e-6)


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pairs = RandomPairs()
        while True:
            yield from (pairs[i] for i in range(len(pairs)))


def test_streams_say_how_long_an_epoch_is(tmp_path: Path) -> None:
    loader = DataLoader(Stream(), batch_size=4)
    run = {'max_steps': 12, 'enable_checkpointing': False}
    with pytest.raises(ValueError, match=r'data have no length.*freeze_last_layer_epochs=1.*sampl'):
        small_trainer(tmp_path, **run).fit(small_task(), loader)
    task = small_task(samples_per_epoch=8, warmup_teacher_temperature_epochs=3)
    small_trainer(tmp_path, **run).fit(task, loader)
    assert task.schedules is not None
    assert (task.schedules.last_layer_lr == 0).nonzero()[0].tolist() == [0, 1]
    assert task.schedules.lr.argmax() in (1, 2)
    assert task.schedules.teacher_temperature[4] < task.schedules.teacher_temperature[5] == 0.07
    with pytest.raises(ValueError, match='schedules need an end'):
        small_trainer(tmp_path, max_epochs=1).fit(small_task(samples_per_epoch=8), loader)


def test_a_warm_up_that_is_the_whole_run_is_said(tmp_path: Path) -> None:
    task, data = small_task(warmup_teacher_temperature_epochs=0.5), RandomPairsDataModule()
    quiet = {'limit_val_batches': 0, 'enable_checkpointing': False}
    with pytest.warns(UserWarning, match='freeze_last_layer_epochs=1 are 4 steps, which is the wh'):
        small_trainer(tmp_path, max_epochs=1, **quiet).fit(task, datamodule=data)
    assert task.schedules is not None
    first = len(task.schedules)
    # Another run of the same task has schedules of its own.
    small_trainer(tmp_path, max_epochs=2, **quiet).fit(task, datamodule=data)
    assert (first, len(task.schedules)) == (4, 8)
