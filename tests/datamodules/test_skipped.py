import os
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, multiprocessing

from geofm.datamodules import NamedBandsDataModule, SEN12MSCRTSDataModule
from geofm.datamodules.skipped import SkippedFiles, innermost
from geofm.datasets import SEN12MSCRTS
from geofm.sen12ms import PairKey
from geofm.sensors import BANDS
from tests.datasets.tree import grid_at, write_pair

GRID = grid_at(32632, 500_000, 5_300_000)
TRAIN, DATES = 4, 2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four training places with two dates each, and two validation pairs."""
    for patch in range(TRAIN):
        for step in range(DATES):
            write_pair(tmp_path, PairKey('ROIs1868', 36, patch, step), GRID)
    for patch in range(2):
        write_pair(tmp_path, PairKey('ROIs2017', 22, patch, 0), GRID)
    return tmp_path


def break_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:999])


class Model(LightningModule):
    """Module that records the files of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.files: dict[str, list[list[str]]] = {'train': [], 'val': []}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self._note('train', batch)
        return batch['image'].mean() * self.weight

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._note('val', batch)

    def _note(self, split: str, batch: dict[str, Tensor]) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.files[split].append(datamodule.files(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make_trainer(epochs: int = 1) -> Trainer:
    return Trainer(
        accelerator='cpu',
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@pytest.mark.parametrize('workers', [0, 2])
def test_skipped_files_are_reported_once_per_epoch(tree: Path, workers: int) -> None:
    datamodule = SEN12MSCRTSDataModule(
        str(tree), batch_size=2, num_workers=workers, on_error='skip', seed=1
    )
    SEN12MSCRTS(tree, 'all')
    train, val = SEN12MSCRTS(tree), SEN12MSCRTS(tree, 'val')
    # The files are damaged after the pairs have been found.
    setup = datamodule.setup

    def break_later(stage: str) -> None:
        setup(stage)
        break_file(train.files_of(3)[0])
        break_file(val.files_of(1)[1])

    datamodule.setup = break_later  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        make_trainer(3).fit(Model(), datamodule)
    told = [str(w.message) for w in caught if 'could not be read' in str(w.message)]
    assert [text.split(':')[0] for text in told] == [
        f'{split}, epoch {epoch}' for epoch in range(3) for split in ('val', 'train')
    ]
    counts = dict.fromkeys(('train', 'val'), 0)
    for text in told:
        split = text.split(',')[0]
        counts[split] += int(text.split()[3])
        expected = train.files_of(3)[0] if split == 'train' else val.files_of(1)[1]
        assert f'(first: {expected})' in text
    for split in counts:
        pairs: Any = innermost(getattr(datamodule, f'{split}_dataset'))
        assert counts[split] == pairs.failures


def test_intact_files_are_not_reported(tree: Path) -> None:
    for on_error in ('raise', 'skip'):
        trainer = make_trainer()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            trainer.fit(Model(), SEN12MSCRTSDataModule(str(tree), on_error=on_error))
        assert not [w for w in caught if 'could not be read' in str(w.message)]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        assert len([c for c in callbacks if isinstance(c, SkippedFiles)]) == 1


@pytest.mark.parametrize(('patch_size', 'n_dates'), [(None, None), (8, None), (8, 2), (None, 1)])
def test_files_of_a_batch(tree: Path, patch_size: int | None, n_dates: int | None) -> None:
    datamodule = SEN12MSCRTSDataModule(
        str(tree), batch_size=2, patch_size=patch_size, n_dates=n_dates
    )
    model = Model()
    make_trainer().fit(model, datamodule)
    pairs = SEN12MSCRTS(tree)
    seen = [file for files in model.files['train'] for file in files]
    every = [str(path) for i in range(len(pairs)) for path in pairs.files_of(i)]
    assert set(seen) <= set(every)
    assert len(seen) == {None: 16, 1: 8, 2: 16}[n_dates]
    val = SEN12MSCRTS(tree, 'val')
    assert model.files['val'] == [[str(p) for i in range(2) for p in val.files_of(i)]]
    # Without a running loop, those of training; for other batches, none.
    datamodule.setup('fit')
    assert datamodule.files({'image': torch.zeros(1)}) == []


def test_files_of_a_wrapped_data_set(tree: Path) -> None:
    pairs = SEN12MSCRTS(tree)
    datamodule = NamedBandsDataModule(
        source_bands=list(BANDS), train_dataset=pairs, bands=('VV', 'B04'), batch_size=3
    )
    model = Model()
    make_trainer().fit(model, datamodule)
    seen = sorted(file for files in model.files['train'] for file in files)
    assert len(seen) == 12
    assert set(seen) <= {str(path) for i in range(len(pairs)) for path in pairs.files_of(i)}


def report(rank: int, tree: str, port: int, told: 'multiprocessing.Queue[list[str]]') -> None:
    """Run one of two ranks, the second of which skips a file."""
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    dist.init_process_group('gloo', rank=rank, world_size=2)
    pairs = SEN12MSCRTS(tree, on_error='skip')
    if rank == 1:
        for _ in range(3):
            pairs._failures.add('/data/broken.tif')  # type: ignore[union-attr]
    callback = SkippedFiles()
    setattr(rank_zero_only, 'rank', rank)  # noqa: B010 - Lightning keeps it there
    trainer, model = make_trainer(), Model()
    trainer.datamodule = SimpleNamespace(train_dataset=pairs)  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        callback.on_train_epoch_end(trainer, model)
        callback.on_train_epoch_end(trainer, model)
    told.put([str(w.message) for w in caught if 'could not be read' in str(w.message)])
    dist.destroy_process_group()


def test_one_rank_reports_for_all(tree: Path) -> None:
    SEN12MSCRTS(tree)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context('fork')
    told: Any = context.Queue()
    ranks = [context.Process(target=report, args=(i, str(tree), port, told)) for i in range(2)]
    for process in ranks:
        process.start()
    (text,) = [text for _ in ranks for text in told.get(timeout=60)]
    assert '3 times' in text
    assert '/data/broken.tif' in text
    for process in ranks:
        process.join()
