import json
import warnings
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from matplotlib import pyplot as plt
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from torchgeo.datamodules import BaseDataModule
from torchgeo.datasets import unbind_samples
from torchgeo.samplers import GriddedPatchSampler, RandomPatchSampler

from geofm.datamodules import SEN12MSCRTSDataModule
from geofm.datamodules.resumable import StartMethod
from geofm.datamodules.sampling import ResumableSampler
from geofm.datasets import SEN12MSCRTS, EmptySplitError, pad_and_stack
from geofm.datasets.seeded import Seeded
from geofm.sen12ms import PairKey
from geofm.sensors import BANDS, BandError, band_statistics
from tests.datasets.tree import SIZE, grid_at, write_pair

TRAIN = 5


@pytest.fixture(scope='module')
def tree(module_path: Path) -> Path:
    """Five training pairs of 32 pixels, one of val of 32, two of test of 24 and 32."""
    for patch in range(TRAIN):
        write_pair(
            module_path, PairKey('ROIs1868', 36, patch, 0), grid_at(4326, 7 + patch / 100, 47.5)
        )
    write_pair(module_path, PairKey('ROIs2017', 22, 0, 0), grid_at(32632, 600000, 5300000))
    write_pair(module_path, PairKey('ROIs2017', 32, 0, 0), grid_at(32632, 500000, 5300000, size=24))
    write_pair(module_path, PairKey('ROIs2017', 32, 1, 0), grid_at(32632, 501000, 5300000))
    return module_path


class Spy(LightningModule):
    """Model that keeps its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: dict[str, list[dict[str, Tensor]]] = {'train': [], 'val': [], 'test': []}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches['train'].append(batch)
        return batch['image'].mean() * self.weight

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.batches['val'].append(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.batches['test'].append(batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch['dates']

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make_trainer(**kwargs: Any) -> Trainer:
    return Trainer(
        accelerator='cpu',
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


@pytest.mark.parametrize(
    ('batch_size', 'sizes'), [(2, [2, 2]), (5, [5]), (8, [5])], ids=['drop', 'exact', 'short']
)
def test_an_incomplete_batch_is_dropped_unless_it_is_the_only_one(
    tree: Path, batch_size: int, sizes: list[int]
) -> None:
    model = Spy()
    make_trainer().fit(model, SEN12MSCRTSDataModule(str(tree), batch_size=batch_size))
    assert [len(batch['image']) for batch in model.batches['train']] == sizes


def test_the_input_of_the_model_is_normalised_by_band(tree: Path) -> None:
    bands = ('B8A', 'VV')
    datamodule = SEN12MSCRTSDataModule(str(tree), bands=bands)
    model = Spy()
    make_trainer().validate(model, datamodule, verbose=False)
    (batch,) = model.batches['val']
    raw = SEN12MSCRTS(tree, 'val', bands=bands)[0]['image']
    expected = (raw - torch.tensor([3840.0, -11.4]).view(2, 1, 1)) / torch.tensor(
        [2200.0, 4.6]
    ).view(2, 1, 1)
    torch.testing.assert_close(batch['image'][0], expected.clamp(-5, 5))
    mean, std = band_statistics(bands)
    assert torch.equal(datamodule.mean, mean)
    assert torch.equal(datamodule.std, std)


def test_torchgeo_undoes_the_normalisation_for_plots(tree: Path) -> None:
    """TorchGeo's tasks denormalise a batch in validation, and plot a sample."""
    datamodule = SEN12MSCRTSDataModule(str(tree))
    model = Spy()
    make_trainer().validate(model, datamodule, verbose=False)
    (batch,) = model.batches['val']
    augmentation = K.AugmentationSequential(
        K.Denormalize(datamodule.mean, datamodule.std), data_keys=None, keepdim=True
    )
    sample = unbind_samples(augmentation(batch))[0]
    raw = SEN12MSCRTS(tree, 'val')[0]
    mean, std = (v.view(-1, 1, 1) for v in band_statistics(BANDS))
    kept = ((raw['image'] - mean) / std).abs() < 5
    torch.testing.assert_close(sample['image'][kept], raw['image'][kept], rtol=1e-4, atol=1e-2)
    fig = datamodule.plot(sample)
    assert fig is not None
    assert len(fig.axes) == 2
    plt.close(fig)


def test_splits(tree: Path) -> None:
    datamodule = SEN12MSCRTSDataModule(str(tree), batch_size=4)
    model, trainer = Spy(), make_trainer()
    assert datamodule.plot({}) is None
    trainer.test(model, datamodule, verbose=False)
    (batch,) = model.batches['test']
    # Patches of 24 and 32 pixels in one batch: padded, never resampled.
    assert batch['image'].shape == (2, 15, SIZE, SIZE)
    assert batch['valid'].sum((1, 2)).tolist() == [24**2, SIZE**2]
    predicted = trainer.predict(model, datamodule)
    assert predicted is not None
    assert sum(map(len, predicted)) == TRAIN + 3
    datamodule.setup('fit')
    loader = datamodule.train_dataloader()
    assert isinstance(loader.sampler, ResumableSampler)
    assert loader.sampler.shuffle
    val_loader = datamodule.val_dataloader()
    assert not isinstance(val_loader, list)
    assert isinstance(val_loader.sampler, SequentialSampler)


def test_random_windows_are_parts_of_their_patches(tree: Path) -> None:
    datamodule = SEN12MSCRTSDataModule(str(tree), batch_size=TRAIN, patch_size=16)
    datamodule.setup('fit')
    pairs = SEN12MSCRTS(tree)
    places = set()
    loader = datamodule.train_dataloader()
    assert isinstance(loader.sampler, ResumableSampler)
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        assert batch['image'].shape == (TRAIN, 15, 16, 16)
        for image, transform in zip(batch['image'], batch['transform'], strict=True):
            starts = torch.tensor(pairs.index['transform'].tolist())[:, [2, 5]]
            offset = (transform[[2, 5]] - starts) / transform[[0, 4]]
            (i,) = ((offset > -0.1) & (offset < 16.1)).all(1).nonzero().flatten().tolist()
            col, row = (round(v) for v in offset[i].tolist())
            assert torch.equal(image, pairs[i]['image'][:, row : row + 16, col : col + 16])
            places.add((row, col))
    assert len(places) > 10
    # Patches that are smaller than the window are read completely.
    datamodule = SEN12MSCRTSDataModule(str(tree), patch_size=64)
    datamodule.setup('fit')
    assert next(iter(datamodule.train_dataloader()))['image'].shape[-2:] == (SIZE, SIZE)


@pytest.mark.parametrize(('start_method', 'num_workers'), [('fork', 2), ('spawn', 1)])
def test_windows_only_depend_on_seed_epoch_and_pair(
    tree: Path, start_method: StartMethod, num_workers: int
) -> None:
    def draw(seed: int, **kwargs: Any) -> list[Tensor]:
        datamodule = SEN12MSCRTSDataModule(
            str(tree), batch_size=1, patch_size=4, n_dates=2, seed=seed, **kwargs
        )
        datamodule.setup('fit')
        loader = datamodule.train_dataloader()
        assert isinstance(loader.sampler, ResumableSampler)
        samples = []
        # Workers are persistent.
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            samples += [torch.cat([b['transform'].flatten(), b['image'].flatten()]) for b in loader]
        return samples

    first = draw(seed=3)
    assert len(first) == 2 * TRAIN
    again = draw(seed=3, num_workers=num_workers, start_method=start_method)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    other_seed = {tuple(sample[:6].tolist()) for sample in draw(seed=4)}
    assert len(other_seed & {tuple(sample[:6].tolist()) for sample in first}) < 5
    rows = [((sample[5] - 47.5) / sample[4]).round().item() for sample in first]
    assert len(set(rows)) > 3


@pytest.mark.parametrize('start_method', ['fork', 'forkserver'])
@pytest.mark.usefixtures('forkserver')
def test_torchgeo_samplers_with_workers(tree: Path, start_method: StartMethod) -> None:
    pairs = SEN12MSCRTS(tree, 'test')
    torch.manual_seed(0)
    queries = [
        *RandomPatchSampler(pairs, size=8, length=6),
        *GriddedPatchSampler(pairs, size=SIZE, stride=SIZE),
    ]

    def load(**kwargs: Any) -> list[dict[str, Tensor]]:
        loader = DataLoader(pairs, 2, sampler=queries, collate_fn=pad_and_stack, **kwargs)
        return list(loader)

    alone = load()
    together = load(num_workers=2, multiprocessing_context=start_method)
    assert len(alone) == len(together) > 4
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one['image'], other['image'])
        assert torch.equal(one['transform'], other['transform'])


def test_lightning_distributes_the_pairs_to_ranks(tree: Path) -> None:
    """Lightning can replace the sampler by a distributed one in evaluation."""
    datamodule = SEN12MSCRTSDataModule(str(tree))
    datamodule.setup('test')
    dataset = datamodule.test_dataloader().dataset
    assert isinstance(dataset, Seeded)
    assert torch.equal(dataset[1]['image'], SEN12MSCRTS(tree, 'test')[1]['image'])


def test_dates_of_a_patch_are_combined(tmp_path: Path) -> None:
    for time_step in range(3):
        for patch in range(2):
            key = PairKey('ROIs1868', 36, patch, time_step)
            write_pair(tmp_path, key, grid_at(4326, 7 + patch / 100, 47.5))
    datamodule = SEN12MSCRTSDataModule(str(tmp_path), batch_size=2, n_dates=2, patch_size=16)
    with pytest.warns(UserWarning, match='without validation'):
        datamodule.setup('fit')
    (batch,) = datamodule.train_dataloader()
    assert batch['image'].shape == (2, 2, 15, 16, 16)
    assert batch['dates'].shape == (2, 2, 2)
    model = Spy()
    with pytest.warns(UserWarning, match='without validation'):
        make_trainer().fit(model, datamodule)
    mean, std = (v.view(-1, 1, 1) for v in band_statistics(BANDS))
    expected = ((batch['image'] - mean) / std).clamp(-5, 5)
    torch.testing.assert_close(model.batches['train'][0]['image'], expected)
    assert datamodule.plot({key: value[0] for key, value in batch.items()}) is not None
    plt.close('all')


def test_fitting_without_validation_rois(tree: Path) -> None:
    datamodule = SEN12MSCRTSDataModule(str(tree / 'ROIs1868'))
    model = Spy()
    with pytest.warns(UserWarning, match="fitting without validation: .*split='val'") as caught:
        make_trainer().fit(model, datamodule)
    assert sum('without validation' in str(w.message) for w in caught) == 1
    assert model.batches['train']
    assert not model.batches['val']
    with pytest.raises(EmptySplitError, match="split='val'"):
        make_trainer().validate(model, datamodule)


def test_fitting_with_validation_does_not_warn(tree: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        SEN12MSCRTSDataModule(str(tree)).setup('fit')


def test_built_by_the_command_line(tree: Path, tmp_path: Path) -> None:
    config = tmp_path / 'config.json'
    arguments = {'paths': str(tree), 'batch_size': 3, 'bands': ['VV', 'B02'], 'patch_size': 8}
    data = {
        'class_path': 'geofm.datamodules.SEN12MSCRTSDataModule',
        'init_args': {**arguments, 'regions': ['africa', 'america']},
    }
    config.write_text(json.dumps({'data': data}))
    cli = LightningCLI(
        Spy,
        datamodule_class=BaseDataModule,
        subclass_mode_data=True,
        run=False,
        args=['--config', str(config), '--data.init_args.batch_size', '4'],
    )
    assert isinstance(cli.config, Namespace)
    assert isinstance(cli.datamodule, SEN12MSCRTSDataModule)
    cli.datamodule.setup('fit')
    batch = next(iter(cli.datamodule.train_dataloader()))
    assert batch['image'].shape == (4, 2, 8, 8)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match='patch_size'):
        SEN12MSCRTSDataModule(patch_size=0)
    with pytest.raises(ValueError, match='n_dates'):
        SEN12MSCRTSDataModule(n_dates=0)
    with pytest.raises(BandError, match='B13'):
        SEN12MSCRTSDataModule(bands=['B13'])
