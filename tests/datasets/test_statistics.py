from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from geofm.datamodules import SEN12MSCRTSDataModule
from geofm.datasets import SEN12MSCRTS
from geofm.datasets.statistics import (
    PERCENTILES,
    BandStatistics,
    dataset_statistics,
    read_statistics,
    write_statistics,
)
from geofm.sensors import BANDS, BandError


def test_statistics_equal_those_of_all_pixels_at_once(tree: Path) -> None:
    ds = SEN12MSCRTS(tree)
    samples = [ds[i] for i in range(len(ds))]
    for sample in samples:
        sample['valid'][:5] = False
        sample['image'][:, :5] = torch.nan
    found = dataset_statistics(samples, BANDS)
    pixels = np.concatenate([s['image'][:, 5:].flatten(1).double().numpy() for s in samples], 1)
    assert list(found) == list(BANDS)
    for band, values in zip(BANDS, pixels, strict=True):
        assert found[band]['mean'] == pytest.approx(values.mean(), rel=1e-12)
        assert found[band]['std'] == pytest.approx(values.std(), rel=1e-12)
        width = 0.01 if band in ('VV', 'VH') else 1
        for p in PERCENTILES:
            exact = np.percentile(values, p, method='inverted_cdf')
            assert found[band]['percentiles'][p] == pytest.approx(exact, abs=width / 2 + 1e-5)


def test_statistics_are_accurate_for_large_offsets() -> None:
    values = torch.tensor([[[1e4, 1e4 + 1, 1e4 + 2]]])
    statistics = BandStatistics(['B02'])
    for _ in range(1000):
        statistics.update(values, torch.ones(1, 3, dtype=torch.bool))
    assert statistics.result()['B02']['std'] == pytest.approx(np.sqrt(2 / 3), rel=1e-9)


def test_nothing_valid_is_an_error() -> None:
    statistics = BandStatistics(['B02'])
    statistics.update(torch.zeros(1, 2, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match='no valid pixel'):
        statistics.result()


def test_the_data_module_uses_the_statistics(tree: Path, tmp_path: Path) -> None:
    ds = SEN12MSCRTS(tree)
    found = dataset_statistics((ds[i] for i in range(len(ds))), BANDS)
    file = tmp_path / 'statistics.yaml'
    write_statistics(file, found, {'split': 'train'})
    assert yaml.safe_load(file.read_text())['split'] == 'train'
    bands = ('B8A', 'VV')
    datamodule = SEN12MSCRTSDataModule(str(tree), bands=bands, statistics=str(file))
    mean, std = read_statistics(file, bands)
    assert mean.tolist() == pytest.approx([found[band]['mean'] for band in bands])
    assert torch.equal(datamodule.mean, mean)
    normalised = datamodule.aug({'image': (mean + std).view(-1, 1, 1)})
    assert torch.allclose(normalised['image'], torch.ones(2, 1, 1))


def test_invalid_statistics_files_are_errors(tmp_path: Path) -> None:
    file = tmp_path / 'a.yaml'
    with pytest.raises(ValueError, match='geofm stats'):
        read_statistics(file, BANDS)
    file.write_text('bands: [1]')
    with pytest.raises(BandError, match='VV'):
        read_statistics(file, BANDS)
    file.write_text('a: 1')
    with pytest.raises(ValueError, match='geofm stats'):
        read_statistics(file, BANDS)
