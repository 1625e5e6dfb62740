import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchgeo.datasets import BigEarthNet, BigEarthNetV2, EuroSAT, SatlasPretrain

from geofm.datasets import NamedBands
from geofm.sensors import BANDS, BandError
from geofm.units import UnitWarning

#: Band names in the order of TorchGeo.
EUROSAT = (
    'B01',
    'B02',
    'B03',
    'B04',
    'B05',
    'B06',
    'B07',
    'B08',
    'B09',
    'B10',
    'B11',
    'B12',
    'B8A',
)
BIGEARTHNET = ('VH', 'VV', *(band for band in BANDS[2:] if band != 'B10'))
SATLAS = ('B04', 'B03', 'B02', 'B05', 'B06', 'B07', 'B08', 'B11', 'B12')


class Labelled(Dataset[Any]):
    """Dataset of images with a constant number per channel."""

    def __init__(self, **images: list[float]) -> None:
        self.images = images

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        images = {
            key: torch.tensor(values).view(-1, 1, 1).expand(-1, 2, 3) + 100 * index
            for key, values in self.images.items()
        }
        return {**images, 'label': torch.tensor(index)}


def values(sample: dict[str, Tensor]) -> list[float]:
    """Return the number of each channel."""
    assert sample['image'].shape[-2:] == (2, 3)
    assert (sample['image'] == sample['image'][..., :1, :1]).all()
    return sample['image'][..., 0, 0].tolist()


@given(st.permutations(BANDS), st.lists(st.sampled_from(BANDS), min_size=1, unique=True))
def test_bands_are_matched_by_name(source: list[str], wanted: list[str]) -> None:
    # Each band has its canonical number, at whatever position in the data.
    dataset = Labelled(image=[float(BANDS.index(band) + 1) for band in source])
    sample = NamedBands(dataset, source, wanted)[0]
    assert values(sample) == [BANDS.index(band) + 1 for band in wanted]
    assert sample['valid'].shape == (2, 3)
    assert sample['valid'].all()
    assert values(NamedBands(dataset, source)[0]) == list(range(1, 16))


def test_a_missing_band_is_named() -> None:
    dataset = Labelled(image=[1.0, 2.0])
    with pytest.raises(BandError, match=r"missing bands \['B8A', 'B10'\].*\['B04', 'B03'\]"):
        NamedBands(dataset, ['B04', 'B03'], ['B03', 'B8A', 'B10'])
    with pytest.raises(BandError, match=r"unknown bands \['B8'\]"):
        NamedBands(dataset, ['B04', 'B8'])
    with pytest.raises(BandError, match='given twice'):
        NamedBands(dataset, ['B04', 'B04'])


def test_names_must_fit_the_image() -> None:
    with pytest.raises(BandError, match=r"'image' of Labelled has shape \(2, 2, 3\).*names 3"):
        NamedBands(Labelled(image=[1.0, 2.0]), ['B04', 'B03', 'B02'])[0]
    with pytest.raises(BandError, match=r"no 'image' in a sample of Labelled.*'image_s2'"):
        NamedBands(Labelled(image_s2=[1.0]), ['B04'])[0]


def test_several_images_become_one() -> None:
    dataset = Labelled(image_sentinel1=[2.0, 1.0], image_sentinel2=[5.0, 4.0], image_landsat=[0.0])
    names = {'image_sentinel2': ['B03', 'B02'], 'image_sentinel1': ['VH', 'VV']}
    sample = NamedBands(dataset, names)[0]
    assert values(sample) == [1, 2, 4, 5]
    assert set(sample) == {'image', 'valid', 'label', 'image_landsat', 'index'}


def test_several_dates_in_the_channels() -> None:
    dataset = Labelled(image=[1.0, 2.0, 11.0, 12.0])
    sample = NamedBands(dataset, ['B03', 'B02'], n_dates=2)[0]
    assert sample['image'].shape == (2, 2, 2, 3)
    assert sample['valid'].shape == (2, 2, 3)
    assert sample['image'][:, :, 0, 0].tolist() == [[2, 1], [12, 11]]
    with pytest.raises(BandError, match=r'names 6 channels.*each of 3 dates'):
        NamedBands(dataset, ['B03', 'B02'], n_dates=3)[0]


def test_units() -> None:
    dataset = Labelled(image=[0.01, 100.0, 0.25])
    names = ['VH', 'VV', 'B04']
    scaled = NamedBands(dataset, names, ['B04', 'VH', 'VV'], {'B04': 10_000}, 'power')[0]
    assert values(scaled) == pytest.approx([2500, -20, 20])
    assert values(NamedBands(dataset, names, scale=2)[0]) == pytest.approx([200, 0.02, 0.5])
    # The sample of the wrapped data set is not modified.
    assert dataset[0]['image'][2, 0, 0] == 0.25


def test_pixels_without_data_are_invalid() -> None:
    class Holes(Labelled):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            image = torch.ones(4, 2, 3)
            image[2:, 0, 0] = 0  # No S2.
            image[2, 0, 1] = 0  # Dark in one band.
            image[0, 1, 0] = torch.nan
            image[1, 1, 1] = 0 if index else -1  # No echo.
            return {'image': image}

    names = ['VV', 'VH', 'B04', 'B03']
    expected = torch.tensor([[False, True, True], [False, True, True]])
    assert torch.equal(NamedBands(Holes(), names)[0]['valid'], expected)
    # Missing data in a band that is not requested make the pixel invalid too.
    assert torch.equal(NamedBands(Holes(), names, ['B04'])[0]['valid'], expected)
    expected[1, 1] = False
    for index in range(2):
        sample = NamedBands(Holes(), names, s1_unit='power')[index]
        assert torch.equal(sample['valid'], expected)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'s1_unit': 'amplitude'}, 's1_unit'),
        ({'scale': 0}, 'scale must be positive'),
        ({'scale': {'B03': 2}}, r"scale has unknown bands \['B03'\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NamedBands(Labelled(image=[1.0]), ['B04'], **arguments)


def test_only_map_style_data_sets() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match='Stream has no length'):
        NamedBands(Stream(), ['B04'])


def test_eurosat_has_b8a_last(shared_data: Path) -> None:
    raw = EuroSAT(str(shared_data / 'torchgeo' / 'eurosat'))
    assert raw.bands == EUROSAT
    sample = NamedBands(raw, EUROSAT)[1]
    assert torch.equal(sample['image'][8], raw[1]['image'][12])
    assert torch.equal(sample['image'][9], raw[1]['image'][8])
    assert torch.equal(sample['label'], raw[1]['label'])


def test_bigearthnet_has_vh_first(shared_data: Path) -> None:
    """In the stand-in, VV is 123 everywhere, and VH is not."""
    root = shared_data / 'torchgeo' / 'bigearthnet'
    raw = BigEarthNet(str(root / 'v1'), bands='all')
    sample = NamedBands(raw, BIGEARTHNET, ['VV', 'VH', 'B12'])[0]
    assert (sample['image'][0] == 123).all()
    assert (sample['image'][1] < 123).all()
    assert torch.equal(sample['image'][2], raw[0]['image'][-1])


def test_satlas_has_an_image_for_each_sensor(shared_data: Path) -> None:
    raw = SatlasPretrain(str(shared_data / 'torchgeo' / 'satlas'), images=['sentinel2'], labels=[])
    sample = NamedBands(raw, {'image_sentinel2': SATLAS})[0]
    assert sample['image'].shape == (9, 512, 512)
    # The images of the stand-in are 0, like real images without data.
    assert not sample['valid'].any()


def test_bigearthnet_v2(shared_data: Path) -> None:
    raw = BigEarthNetV2(str(shared_data / 'torchgeo' / 'bigearthnet' / 'v2'), bands='all')
    names = {'image_s1': BIGEARTHNET[:2], 'image_s2': BIGEARTHNET[2:]}
    sample = NamedBands(raw, names, ['B02', 'VV'])[0]
    assert sample['image'].shape == (2, 120, 120)


class Backscatter(Dataset[Any]):
    """Sentinel-1 in a given unit. The first image is at the edge of a swath: fill only."""

    def __init__(self, unit: str) -> None:
        generator = torch.Generator().manual_seed(0)
        decibel = -12 + 3 * torch.randn(4, 2, 8, 8, generator=generator)
        self.images = 10 ** (decibel / 10) if unit == 'power' else decibel
        self.images[0] = 0
        self.images[:, :, 0] = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'image': self.images[index]}


@pytest.mark.parametrize(
    ('unit', 'said', 'message'),
    [
        (
            'power',
            'dB',
            "s1_unit='dB' .*: values of Sentinel-1 GRD .* look like linear power, not dB",
        ),
        ('dB', 'power', "look like dB, not power: remove s1_unit='power'"),
        ('dB', 'dB', None),
        ('power', 'power', None),
    ],
)
def test_backscatter_in_another_unit_warns_once(unit: str, said: Any, message: str | None) -> None:
    data = NamedBands(Backscatter(unit), ['VV', 'VH'], s1_unit=said)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for index in range(4):
            data[index]
    told = [str(w.message) for w in caught if w.category is UnitWarning]
    assert len(told) == (message is not None)
    assert message is None or re.search(message, told[0])
