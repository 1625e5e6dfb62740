from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geofm.datamodules import MMFloodHeightDataModule
from geofm.datamodules.mmflood_height import MEDIAN, STD
from tests.dense import write_mmflood


def test_heights_are_those_of_the_elevation_model(tmp_path: Path) -> None:
    datamodule = MMFloodHeightDataModule(2, 32, root=write_mmflood(tmp_path))
    datamodule.setup('fit')
    dataset: Any = datamodule.train_dataset
    sample = dataset[dataset.bounds]
    heights: Tensor = sample['mask'] * STD + MEDIAN
    slope = torch.linspace(0, 190, 96)[:, None].expand(96, 92)
    torch.testing.assert_close(heights[:, 4:], slope, atol=1e-3, rtol=0)
    # Where Sentinel-1 is missing, the target is the mean of the other pixels.
    torch.testing.assert_close(heights[:, :4], torch.full((96, 4), 95.0), atol=1e-3, rtol=0)
    assert sample['image'].shape == (2, 96, 96)
    assert sample['image'][:, :, :4].isnan().all()
    assert (sample['image'][:, :, 4:] > 0).all()


def test_a_window_without_data_has_the_median_height(tmp_path: Path) -> None:
    datamodule = MMFloodHeightDataModule(2, 32, root=write_mmflood(tmp_path))
    datamodule.setup('fit')
    dataset: Any = datamodule.train_dataset
    x, y, t = dataset.bounds
    west = slice(x.start, x.start + 4 * x.step, x.step)
    sample = dataset[west, y, t]
    assert sample['image'].isnan().all()
    assert (sample['mask'] == 0).all()


def test_splits_have_different_tiles(tmp_path: Path) -> None:
    datamodule = MMFloodHeightDataModule(2, 32, root=write_mmflood(tmp_path))
    for stage in ('fit', 'validate', 'test'):
        datamodule.setup(stage)
    splits: list[Any] = [getattr(datamodule, f'{s}_dataset') for s in ('train', 'val', 'test')]
    assert [round(dataset.bounds[0].start) for dataset in splits] == [10, 11, 12]


def test_windows_beyond_a_tile_are_without_data(tmp_path: Path) -> None:
    datamodule = MMFloodHeightDataModule(2, 64, root=write_mmflood(tmp_path))
    datamodule.setup('validate')
    dataset: Any = datamodule.val_dataset
    sampler: Any = datamodule.val_sampler
    samples = [dataset[window] for window in sampler]
    for sample in samples:
        assert sample['image'].shape == (2, 64, 64)
        known = sample['image'].isfinite().all(dim=0)
        if known.any():
            filled = sample['mask'][~known]
            mean = sample['mask'][known].mean()
            torch.testing.assert_close(filled, mean.expand_as(filled), atol=1e-5, rtol=0)
    # With 96 px and windows of 64 px, some windows are partly outside.
    assert any(not s['image'][:, :, 4:].isfinite().all() for s in samples)


def test_heights_are_plotted_in_metres(tmp_path: Path) -> None:
    datamodule = MMFloodHeightDataModule(2, 32, root=write_mmflood(tmp_path))
    datamodule.setup('validate')
    dataset: Any = datamodule.val_dataset
    sample = dataset[dataset.bounds]
    figure = dataset.plot({**sample, 'prediction': sample['mask'][None]})
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ['VV in dB', 'mask in m', 'prediction in m']
    drawn = figure.axes[1].images[0].get_array()
    assert drawn.min() == pytest.approx(0, abs=1e-3)
    assert drawn.max() == pytest.approx(190, abs=1e-3)


def test_tiles_smaller_than_a_window_are_refused(tmp_path: Path) -> None:
    datamodule = MMFloodHeightDataModule(2, 256, length=4, root=write_mmflood(tmp_path))
    with pytest.raises(ValueError, match=r'no tile of .* is large enough for a window of 256 px'):
        datamodule.setup('fit')
