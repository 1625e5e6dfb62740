import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from geofm.datamodules import LabelledFolderDataModule, NamedBandsDataModule
from geofm.sensors import BandError, band_statistics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images, whose pixels encode the class and the number of the image."""
    for label, name in enumerate(('field', 'water')):
        (tmp_path / name).mkdir()
        for number in range(10):
            path = tmp_path / name / f'{number}.tif'
            profile = {'driver': 'GTiff', 'width': 4, 'height': 3, 'count': 2, 'dtype': 'uint16'}
            with rasterio.open(path, 'w', **profile) as dst:
                dst.write(np.full((2, 3, 4), 100 * label + number, np.uint16))
    return tmp_path


def contents(data: LabelledFolderDataModule) -> list[list[tuple[int, int]]]:
    data.setup('fit')
    splits = [data.train_dataset, data.val_dataset, data.test_dataset]
    return [
        [(int(s['image'][0, 0, 0]), int(s['label'])) for s in (split[i] for i in range(len(split)))]  # type: ignore[index, arg-type]
        for split in splits
    ]


def test_every_image_is_in_one_split_with_its_class(folder: Path) -> None:
    train, val, test = contents(LabelledFolderDataModule(folder, 0.2, 0.3))
    assert [len(split) for split in (train, val, test)] == [10, 4, 6]
    everything = sorted(train + val + test)
    assert everything == [(100 * c + n, c) for c in range(2) for n in range(10)]
    assert sum(label for _, label in test) == 3


def test_the_split_only_depends_on_the_seed(folder: Path) -> None:
    first = contents(LabelledFolderDataModule(folder, seed=1))
    assert contents(LabelledFolderDataModule(folder, seed=1)) == first
    assert contents(LabelledFolderDataModule(folder, seed=2)) != first


def test_there_is_a_warning_of_held_out_images_unless_fractions_are_given(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r'8 of 20 images are held out.*both to 0 to train on all'):
        LabelledFolderDataModule(folder).setup('fit')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        LabelledFolderDataModule(folder, 0.2, 0.2).setup('fit')
        data = LabelledFolderDataModule(folder, 0, 0)
        data.setup('fit')
    assert len(data.train_dataset) == 20  # type: ignore[arg-type]
    assert data.val_dataset is None
    assert data.test_dataset is None


def test_bands_without_names_are_not_normalised(folder: Path) -> None:
    data = LabelledFolderDataModule(folder, 0.2, 0.2, batch_size=4)
    data.setup('fit')
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(BandError, match='NamedBandsDataModule and name them with source_bands'):
        data.aug(batch)
    named = NamedBandsDataModule(['B04', 'B03'], data)
    named.setup('fit')
    batch = next(iter(named.train_dataloader()))
    mean, std = (s.view(-1, 1, 1) for s in band_statistics(('B03', 'B04')))
    expected = (batch['image'] - mean) / std
    torch.testing.assert_close(named.aug(batch)['image'], expected)


def test_batches_have_all_bands(folder: Path) -> None:
    data = LabelledFolderDataModule(folder, batch_size=4)
    data.setup('fit')
    batch = next(iter(data.train_dataloader()))
    assert batch['image'].shape == (4, 2, 3, 4)
    assert batch['image'].dtype == torch.float32


def test_errors_name_the_file(folder: Path) -> None:
    with pytest.raises(ValueError, match='leave no image'):
        LabelledFolderDataModule(folder, 0.5, 0.5)
    with pytest.raises(ValueError, match='absent: must contain a folder of images for each class'):
        LabelledFolderDataModule(folder / 'absent').setup('fit')
    for broken in (folder / 'field').iterdir():
        broken.write_bytes(b'no image')
    data = LabelledFolderDataModule(folder)
    data.setup('fit')
    with pytest.raises(ValueError, match=r'field/\d\.tif: cannot be read'):
        data.train_dataset[0]  # type: ignore[index]
