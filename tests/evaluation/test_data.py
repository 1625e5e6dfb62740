from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from torch.utils.data import Dataset
from torchgeo.datamodules import BaseDataModule, GeoDataModule
from torchgeo.datasets import RasterDataset
from torchgeo.samplers import GriddedPatchSampler, RandomPatchSampler

from geofm.datamodules import NamedBandsDataModule
from geofm.evaluation import BackboneConfig, ProbeSettings, labelled_data, run_benchmark
from geofm.sensors import BandError
from geofm.units import UnitWarning
from tests.evaluation.labelled import TINY


class Images(Dataset[Any]):
    """Reflectances of two bands in [0, 1], with any targets."""

    def __init__(self, length: int = 10, **targets: Any) -> None:
        self.images = torch.rand(length, 2, 16, 16, generator=torch.Generator().manual_seed(length))
        self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return {'image': self.images[index], **{k: v[index] for k, v in self.targets.items()}}


class Module(BaseDataModule):
    """Data module with given splits."""

    def __init__(self, **splits: Dataset[Any]) -> None:
        super().__init__(Images, 4)
        self.splits = splits

    def setup(self, stage: str) -> None:
        for split, dataset in self.splits.items():
            setattr(self, f'{split}_dataset', dataset)


LABELS = torch.arange(10) % 3


def wrap(module: BaseDataModule, **kwargs: Any) -> NamedBandsDataModule:
    return NamedBandsDataModule(['B03', 'B02'], module, scale=10_000, **kwargs)


def test_unknown_channels_must_be_named() -> None:
    module = Module(train=Images(label=LABELS), test=Images(label=LABELS))
    with pytest.raises(BandError, match='channels of Images are unknown'):
        labelled_data(module)
    data = labelled_data(wrap(module))
    assert data.bands == ('B02', 'B03')
    raw = module.splits['test'][3]['image']
    torch.testing.assert_close(data.splits['test'][3]['image'], 10_000 * raw[[1, 0]])


def test_units_are_checked() -> None:
    # The values of the module are reflectances.
    module = Module(train=Images(label=LABELS), test=Images(label=LABELS))
    with pytest.warns(UnitWarning, match='look like reflectance, not DN'):
        labelled_data(NamedBandsDataModule(['B03', 'B02'], module))
    with pytest.warns(UnitWarning, match='beyond the range of the sensor: check the scale'):
        labelled_data(NamedBandsDataModule(['B03', 'B02'], module, scale=1e8))


def test_missing_splits_are_derived_from_the_others() -> None:
    data = labelled_data(wrap(Module(train=Images(label=LABELS), test=Images(label=LABELS))))
    assert [data.size(split) for split in ('train', 'val', 'test')] == [8, 2, 10]
    assert any('2 of 10 training samples are held out' in note for note in data.notes)
    data = labelled_data(wrap(Module(train=Images(label=LABELS), val=Images(9, label=LABELS))))
    assert [data.size(split) for split in ('train', 'val', 'test')] == [8, 2, 9]
    assert any('metrics are of the validation split' in note for note in data.notes)
    with pytest.raises(ValueError, match='a training split and a validation or test split'):
        labelled_data(wrap(Module(train=Images(label=LABELS))))


@pytest.mark.parametrize(
    ('targets', 'task'),
    [
        ({'label': LABELS}, 'classification'),
        ({'label': torch.zeros(10, 4, dtype=torch.long)}, 'multilabel'),
        ({'mask': torch.zeros(10, 16, 16, dtype=torch.long)}, 'segmentation'),
        ({'mask': torch.zeros(10, 1, 16, 16)}, 'regression'),
        ({'mask': torch.zeros(10, 16, 16), 'label': LABELS}, 'classification'),
    ],
)
def test_the_task_is_what_samples_have(targets: dict[str, Any], task: str) -> None:
    images = Images(**targets)
    data = labelled_data(wrap(Module(train=images, val=images, test=images)))
    assert data.task == task
    (batch, *_) = data.loader('test')
    expected = (4, 16, 16) if data.dense else (4, *targets['label'].shape[1:])
    assert data.targets(batch).shape == expected


def test_a_task_without_a_target_is_an_error() -> None:
    images = Images(label=LABELS)
    module = wrap(Module(train=images, val=images, test=images))
    with pytest.raises(ValueError, match=r"'segmentation' is not one of \['classification'\]"):
        labelled_data(module, task='segmentation')
    nothing = Images()
    with pytest.raises(ValueError, match='but neither a label of classes nor a mask'):
        labelled_data(wrap(Module(train=nothing, val=nothing, test=nothing)))


def test_a_limit_draws_the_same_samples_for_one_seed() -> None:
    images = Images(label=LABELS)
    module = Module(train=images, val=images, test=images)

    def drawn(seed: int) -> torch.Tensor:
        data = labelled_data(wrap(module), limit=4, seed=seed)
        assert [data.size(split) for split in ('train', 'val', 'test')] == [4, 4, 4]
        return torch.stack([data.splits['train'][i]['image'] for i in range(4)])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize(
    ('mean', 'std', 'said'),
    [
        (0.0, 255.0, 'leaves bands with standard deviations from 0.001'),
        (0.5, 0.3, 'its normalisation, by its own mean and std, is not used'),
        (0.0, -0.3, 'inverts bands'),
    ],
)
def test_faults_of_a_normalisation_are_noted(mean: float, std: float, said: str) -> None:
    images = Images(label=LABELS)
    module = Module(train=images, val=images, test=images)
    module.mean, module.std = torch.tensor(mean), torch.tensor(std)
    (note,) = labelled_data(wrap(module)).notes
    assert note.startswith('Module: ')
    assert said in note


def test_statistics_that_a_user_gives_are_kept() -> None:
    images = Images(label=LABELS)
    module = Module(train=images, val=images, test=images)
    data = labelled_data(wrap(module, mean={'B02': 700.0}, std={'B02': 90.0}))
    assert data.statistics['B02'] == (700.0, 90.0)
    assert labelled_data(wrap(module)).statistics == {}


class Bands(RasterDataset):
    filename_glob = 'image.tif'
    all_bands = ('B02', 'B03')


class Mask(RasterDataset):
    filename_glob = 'mask.tif'
    is_image = False


class Ground(GeoDataModule):
    """Windows of one scene: random windows for training, a grid for testing."""

    def __init__(self, root: Path) -> None:
        super().__init__(Bands, 4, 16, 12)
        self.root = root

    def setup(self, stage: str) -> None:
        self.dataset = Bands(self.root) & Mask(self.root)
        self.train_dataset = self.val_dataset = self.test_dataset = self.dataset
        self.train_sampler = RandomPatchSampler(self.dataset, size=16, length=12)
        self.val_sampler = self.test_sampler = GriddedPatchSampler(self.dataset, size=16, stride=16)


@pytest.fixture
def ground(tmp_path: Path) -> Callable[[], NamedBandsDataModule]:
    rng = np.random.default_rng(0)
    classes = np.kron(rng.integers(0, 2, (5, 5)), np.ones((16, 16))).astype(np.uint8)
    image = (1000 + 2000 * classes.astype(int) + rng.integers(0, 100, (2, 80, 80))).astype(
        np.uint16
    )
    place = rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)
    for name, pixels in (('image', image), ('mask', classes[None])):
        profile = {'driver': 'GTiff', 'width': 80, 'height': 80, 'count': len(pixels)}
        profile |= {'dtype': pixels.dtype, 'crs': 'EPSG:32632', 'transform': place}
        with rasterio.open(tmp_path / f'{name}.tif', 'w', **profile) as dst:
            dst.write(pixels)
    return lambda: NamedBandsDataModule(['B02', 'B03'], Ground(tmp_path))


def test_windows_of_geo_samplers_are_drawn_once(
    ground: Callable[[], NamedBandsDataModule],
) -> None:
    first, second = labelled_data(ground(), seed=1), labelled_data(ground(), seed=1)
    assert first.bands == ('B02', 'B03')
    assert (first.size('train'), first.size('test')) == (12, 25)
    assert first.fingerprint('train') == second.fingerprint('train')
    assert labelled_data(ground(), seed=2).fingerprint('train') != first.fingerprint('train')
    config = BackboneConfig('geofm_vit_tiny_patch16_s2', model_args=TINY)
    settings = ProbeSettings(steps=100, progress=False)
    report = run_benchmark([config], first, settings, None, lambda line: None)
    best = max(score.value for score in report.scores if score.metric == 'mIoU')
    assert best > 0.9
