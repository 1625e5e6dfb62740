import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchgeo.datasets import stack_samples

from geofm.datamodules.resumable import ResumableDataModule, StartMethod
from geofm.datamodules.sampling import ResumableLoader, ResumableSampler, run_seed
from geofm.datasets.seeded import Seeded, Visit

type Sample = dict[str, Tensor]


class Numbers(Dataset[Sample]):
    """Samples with their index and random numbers from each generator."""

    def __init__(self, length: int = 24) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        drawn = (torch.rand(()).item(), np.random.rand(), random.random())  # noqa: NPY002
        return {
            'image': torch.zeros(1, 2, 2),
            'number': torch.tensor(int(index)),
            'drawn': torch.tensor(drawn, dtype=torch.float64),
        }


class NumbersDataModule(ResumableDataModule):
    def __init__(
        self,
        length: int = 24,
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 0,
        start_method: StartMethod | None = None,
    ) -> None:
        super().__init__(Numbers, batch_size, num_workers)
        self.seed, self.start_method, self.length = seed, start_method, length
        self.aug = lambda batch: batch

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_dataset = Numbers(self.length)
        self.val_dataset = Numbers(4)

    def train_dataloader(self) -> Any:
        return self._training_loader(self._valid_attribute('train_dataset'), self.batch_size)

    def val_dataloader(self) -> Any:
        return self._ordered_loader(self._valid_attribute('val_dataset'), self.batch_size)


class Recorder(LightningModule):
    """Module that records the batches of each epoch."""

    def __init__(self, early_setup: bool = True, file: Path | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.early_setup, self.file = early_setup, file
        self.seen: list[tuple[int, list[int], list[float]]] = []

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        numbers = batch['number'].tolist()
        self.seen.append((self.current_epoch, numbers, batch['drawn'].flatten().tolist()))
        if self.file is not None:
            with self.file.with_suffix(f'.{self.global_rank}').open('a') as file:
                file.write(f'{self.current_epoch} {numbers}\n')
        return self.weight * batch['image'].mean()

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        self.log('val', batch['image'].mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.early_setup:
            # Like schedules do. Lightning then makes the loaders before it restores the loops.
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(path: Path, **kwargs: Any) -> Trainer:
    return Trainer(
        **{
            'default_root_dir': path,
            'accelerator': 'cpu',
            'max_epochs': 4,
            'logger': False,
            'enable_checkpointing': False,
            'enable_progress_bar': False,
            'enable_model_summary': False,
            'num_sanity_val_steps': 0,
            **kwargs,
        }
    )


# -- the sampler ----------------------------------------------------------------------------------


@given(
    length=st.integers(1, 60),
    processes=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
)
def test_samples_are_distributed_to_the_ranks(
    length: int, processes: int, seed: int, epoch: int
) -> None:
    dataset = Numbers(max(length, processes))
    shares = []
    for rank in range(processes):
        sampler = ResumableSampler(dataset, seed, num_replicas=processes, rank=rank)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == len(dataset) // processes
    dealt = [int(number) for share in shares for number in share]
    # No sample occurs twice, and only the remainder of an even distribution is left out.
    assert len(set(dealt)) == len(dealt) == len(dataset) - len(dataset) % processes
    assert set(dealt) <= set(range(len(dataset)))


@given(
    length=st.integers(8, 60),
    batch_size=st.integers(1, 4),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    data=st.data(),
)
def test_an_epoch_resumes_with_another_number_of_ranks(
    length: int, batch_size: int, before: int, after: int, data: st.DataObject
) -> None:
    def samplers(processes: int) -> list[ResumableSampler]:
        return [
            ResumableSampler(Numbers(length), 3, num_replicas=processes, rank=rank)
            for rank in range(processes)
        ]

    seen: list[int] = []
    batches = data.draw(st.integers(0, length // (batch_size * before)))
    for sampler in samplers(before):
        seen += list(sampler)[: batches * batch_size]
    state = {'seed': 3, 'epoch': 0, 'start': batches * batch_size * before}
    rest: list[int] = []
    for sampler in samplers(after):
        sampler.load_state_dict(state)
        rest += list(sampler)
    assert not set(seen) & set(rest)
    assert len(seen) + len(rest) > length - after


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        sampler = ResumableSampler(Numbers(50), seed, shuffle)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(2, 1)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2, shuffle=False) == list(range(50))


def test_a_new_epoch_starts_at_its_start() -> None:
    sampler = ResumableSampler(Numbers(10))
    sampler.load_state_dict({'seed': 5, 'epoch': 2, 'start': 8})
    assert len(list(sampler)) == 2
    assert len(sampler) == 10
    sampler.set_epoch(2)
    assert len(list(sampler)) == 2
    sampler.set_epoch(3)
    assert len(list(sampler)) == 10


def test_too_few_samples_for_the_ranks() -> None:
    with pytest.raises(ValueError, match='2 samples for 3 ranks: too few'):
        ResumableSampler(Numbers(2), num_replicas=3, rank=0)


# -- random numbers -------------------------------------------------------------------------------


def test_random_numbers_only_depend_on_seed_epoch_and_sample() -> None:
    dataset = Seeded(Numbers(5))
    first = dataset[Visit(3, epoch=1, seed=7)]['drawn']
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(dataset[Visit(3, epoch=1, seed=7)]['drawn'], first)
    others = [Visit(3, 1, 8), Visit(3, 2, 7), Visit(2, 1, 7), Visit(1, 3, 7), Visit(3)]
    for visit in others:
        assert (dataset[visit]['drawn'] != first).all()
    assert torch.equal(dataset[Visit(3)]['drawn'], dataset[3]['drawn'])


def test_the_state_of_generators_is_restored() -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)

    seed()
    expected = draw()
    seed()
    Seeded(Numbers(5))[2]
    assert draw() == expected


def test_seed_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('PL_GLOBAL_SEED', raising=False)
    assert run_seed() == 0
    monkeypatch.setenv('PL_GLOBAL_SEED', '12')
    assert run_seed() == 12
    assert run_seed(3) == 3


# -- the loader -----------------------------------------------------------------------------------


def epochs(loader: Any, n: int = 2) -> Iterator[tuple[int, list[int], list[float]]]:
    for epoch in range(n):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield epoch, batch['number'].tolist(), batch['drawn'].flatten().tolist()


@pytest.mark.parametrize('start_method', ['fork', 'forkserver'])
@pytest.mark.usefixtures('forkserver')
def test_workers_give_the_samples_of_a_single_process(start_method: StartMethod) -> None:
    def loaded(**kwargs: Any) -> list[Any]:
        datamodule = NumbersDataModule(seed=4, batch_size=6, **kwargs)
        datamodule.setup('fit')
        return list(epochs(datamodule.train_dataloader()))

    alone = loaded()
    # Persistent workers keep their copy of the data set in the second epoch.
    assert loaded(num_workers=2, start_method=start_method) == alone
    assert {epoch for epoch, _, _ in alone} == {0, 1}
    assert alone[0] != alone[4]


def test_the_loader_resumes_without_a_trainer() -> None:
    def make_loader() -> ResumableLoader:
        sampler = ResumableSampler(Numbers(10), seed=2)
        return ResumableLoader(Numbers(10), batch_size=3, sampler=sampler, collate_fn=stack_samples)

    whole = [batch['number'].tolist() for batch in make_loader()]
    for done in range(5):
        loader = make_loader()
        for _, _ in zip(range(done), loader, strict=False):
            pass
        resumed = make_loader()
        resumed.load_state_dict(loader.state_dict())
        rest = [batch['number'].tolist() for batch in resumed]
        if done < 4:
            assert rest == whole[done:]
        else:
            assert resumed.state_dict()['epoch'] == 2
            assert len(rest) == 4
            assert rest != whole


@pytest.mark.parametrize(('length', 'batches'), [(7, 3), (1, 1), (4, 2)])
def test_an_incomplete_batch_is_dropped_unless_it_is_the_only_one(
    length: int, batches: int
) -> None:
    datamodule = NumbersDataModule(length=length)
    datamodule.setup('fit')
    assert len(list(datamodule.train_dataloader())) == batches


# -- resuming with Lightning ----------------------------------------------------------------------


class Save(Callback):
    """Write a checkpoint at some point, and stop there."""

    def __init__(self, path: Path, hook: str, epoch: int, batch: int = 0) -> None:
        self.path, self.hook, self.epoch, self.batch = path, hook, epoch, batch
        self.saved = False

    def _save(self, trainer: Trainer, hook: str) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        due = trainer.current_epoch == self.epoch and batches >= self.batch
        if hook == self.hook and due and not self.saved:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.saved = True

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, 'step')

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, 'batch_end')

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, 'validation_end')

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, 'epoch_end')


# Epoch and steps that an interrupted run has completed, with 12 batches per epoch.
POINTS = [
    ('batch_end', 0, 5, (0, 5)),
    ('batch_end', 2, 7, (2, 7)),
    ('batch_end', 1, 12, (1, 12)),
    ('step', 1, 6, (1, 5)),
    ('step', 0, 1, (0, 0)),
    ('validation_end', 1, 0, (1, 12)),
    ('epoch_end', 1, 0, (1, 12)),
]


@pytest.fixture(scope='module', params=[False, True])
def whole(module_path: Path, request: pytest.FixtureRequest) -> Recorder:
    """An uninterrupted run, with and without *early_setup*."""
    recorder = Recorder(request.param)
    make_trainer(module_path).fit(recorder, NumbersDataModule(seed=1))
    return recorder


@pytest.mark.parametrize(('hook', 'epoch', 'batch', 'done'), POINTS)
def test_a_resumed_run_sees_the_samples_of_an_uninterrupted_run(
    tmp_path: Path, hook: str, epoch: int, batch: int, done: tuple[int, int], whole: Recorder
) -> None:
    early_setup = whole.early_setup
    checkpoint = tmp_path / 'half.ckpt'
    save = Save(checkpoint, hook, epoch, batch)
    make_trainer(tmp_path, callbacks=[save]).fit(Recorder(early_setup), NumbersDataModule(seed=1))
    assert save.saved

    resumed = Recorder(early_setup)
    # The seed is that of the original run.
    make_trainer(tmp_path).fit(
        resumed, NumbersDataModule(seed=99), ckpt_path=checkpoint, weights_only=True
    )
    steps = done[0] * 12 + done[1]
    assert resumed.seen == whole.seen[steps:]


def test_resumed_with_workers_and_part_of_an_epoch(tmp_path: Path) -> None:
    def fit(recorder: Recorder, *callbacks: Callback, **kwargs: Any) -> None:
        trainer = make_trainer(
            tmp_path, max_epochs=2, limit_train_batches=9, callbacks=list(callbacks)
        )
        trainer.fit(recorder, NumbersDataModule(num_workers=2), **kwargs)

    whole, resumed, checkpoint = Recorder(), Recorder(), tmp_path / 'half.ckpt'
    fit(whole)
    fit(Recorder(), Save(checkpoint, 'batch_end', 1, 4))
    fit(resumed, ckpt_path=checkpoint, weights_only=True)
    assert len(whole.seen) == 18
    assert resumed.seen == whole.seen[13:]


def test_lightning_issues_no_warnings(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    checkpoint = tmp_path / 'half.ckpt'
    make_trainer(tmp_path, callbacks=[Save(checkpoint, 'batch_end', 0, 5)]).fit(
        Recorder(), NumbersDataModule()
    )
    make_trainer(tmp_path).fit(
        Recorder(), NumbersDataModule(), ckpt_path=checkpoint, weights_only=True
    )
    assert not [w for w in recwarn if 'resum' in str(w.message)]


def test_a_second_fit_starts_at_the_beginning(tmp_path: Path) -> None:
    datamodule = NumbersDataModule()
    seen = []
    for _ in range(2):
        recorder = Recorder()
        make_trainer(tmp_path, max_epochs=1).fit(recorder, datamodule)
        seen.append(recorder.seen)
    assert seen[0] == seen[1]


def test_overfitting_a_few_batches(tmp_path: Path) -> None:
    recorder = Recorder()
    save = Save(tmp_path / 'some.ckpt', 'epoch_end', 1)
    make_trainer(tmp_path, overfit_batches=2, callbacks=[save]).fit(recorder, NumbersDataModule())
    assert [numbers for _, numbers, _ in recorder.seen] == [[0, 1], [2, 3]] * 2


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_two_ranks_train_on_different_samples(tmp_path: Path) -> None:
    """A real run on two ranks, interrupted and resumed, without warnings about samplers."""

    def fit(name: str, *callbacks: Callback, **kwargs: Any) -> list[list[tuple[str, set[int]]]]:
        file = tmp_path / name
        trainer = make_trainer(
            tmp_path, max_epochs=2, devices=2, strategy='ddp_fork', callbacks=list(callbacks)
        )
        trainer.fit(Recorder(file=file), NumbersDataModule(length=26), **kwargs)
        ranks = []
        for rank in range(2):
            lines = file.with_suffix(f'.{rank}').read_text().splitlines()
            ranks.append([(line[0], set(map(int, line[3:-1].split(',')))) for line in lines])
        return ranks

    checkpoint = tmp_path / 'half.ckpt'
    whole = fit('whole')
    fit('half', Save(checkpoint, 'batch_end', 1, 2))
    resumed = fit('resumed', ckpt_path=checkpoint, weights_only=True)
    for epoch in '01':
        shares = [set().union(*(n for e, n in rank if e == epoch)) for rank in whole]
        assert not shares[0] & shares[1]
        assert len(shares[0] | shares[1]) == 24
    assert [len(rank) for rank in whole] == [12, 12]
    assert resumed == [rank[8:] for rank in whole]


def test_checkpoint_callback_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """A typical run: ModelCheckpoint every n steps, and resuming from its file."""
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=17, save_top_k=-1)
    whole, resumed = Recorder(), Recorder()
    make_trainer(tmp_path, callbacks=[keep], enable_checkpointing=True).fit(
        whole, NumbersDataModule()
    )
    (checkpoint,) = tmp_path.glob('*step=17.ckpt')
    make_trainer(tmp_path).fit(
        resumed, NumbersDataModule(), ckpt_path=checkpoint, weights_only=True
    )
    assert resumed.seen == whole.seen[17:]
