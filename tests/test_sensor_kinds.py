"""Units, fill and photometry of sensors other than Sentinel-1 and Sentinel-2 Level-1C."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

from geofm.datasets import NamedBands
from geofm.datasets.statistics import BandStatistics
from geofm.sensor_rasters import SensorBands, band_name
from geofm.sensors import (
    DEM,
    LANDSAT,
    RGB,
    SENTINEL1,
    SENTINEL2,
    SENTINEL2_L2A,
    Band,
    Sensor,
    SensorPhotometry,
    band_statistics,
    bands_of,
    register_sensor,
)
from geofm.transforms import Photometry
from geofm.transforms.multicrop import MultiCrop
from geofm.transforms.photometry import Speckle
from geofm.units import WrongUnit, wrong_unit

from .registry import kept_registry

RNG = np.random.default_rng(0)
PLACE: dict[str, Any] = {
    'driver': 'GTiff',
    'crs': 'EPSG:32632',
    'transform': Affine(10, 0, 500_000, 0, -10, 5_300_000),
}
REFLECTANCE = RNG.uniform(0.02, 0.5, (7, 8, 8))
LANDSAT_DN = np.round((REFLECTANCE + 0.2) / 2.75e-5)


def read(path: Path, pixels: np.ndarray, sensor: Sensor, **profile: Any) -> Any:
    """Write pixels to a file, and return the values and valid pixels that are read."""
    count, height, width = pixels.shape
    shape = {'count': count, 'height': height, 'width': width, 'dtype': pixels.dtype.name}
    stated = {key: profile.pop(key) for key in ('scales', 'offsets') if key in profile}
    with rasterio.open(path, 'w', **PLACE, **shape, **profile) as dst:
        dst.write(pixels)
        for key, values in stated.items():
            setattr(dst, key, values)
    with rasterio.open(path) as src:
        return SensorBands.of(src, sensor).read(src)


@pytest.mark.parametrize(
    ('values', 'sensor', 'found'),
    [
        (LANDSAT_DN, LANDSAT, None),
        (REFLECTANCE, LANDSAT, WrongUnit.REFLECTANCE),
        (RNG.gamma(2, 800, 9000) + 50, SENTINEL2_L2A, None),
        (RNG.gamma(2, 800, 9000) + 1050, SENTINEL2_L2A, WrongUnit.OFFSET),
        (RNG.integers(0, 256, 9000), RGB, None),
        (RNG.uniform(0, 1, 9000), RGB, WrongUnit.FRACTION),
        (np.zeros(9000), RGB, None),
        (RNG.normal(0, 1, 9000), DEM, None),
        (RNG.normal(900, 500, 9000), DEM, None),
    ],
)
def test_units_are_detected_by_quantity(
    values: np.ndarray, sensor: Sensor, found: WrongUnit | None
) -> None:
    assert wrong_unit(values.astype(np.float32), sensor) == found


def test_advice_has_the_scale_and_offset_of_the_sensor() -> None:
    assert 'multiply them by 10,000' in WrongUnit.REFLECTANCE.advice(SENTINEL2)
    assert 'multiply them by 36,364 and add 7,273' in WrongUnit.REFLECTANCE.advice(LANDSAT)


@pytest.mark.parametrize(
    ('pixels', 'stated'),
    [
        (LANDSAT_DN.astype('uint16'), {}),
        (LANDSAT_DN.astype('uint16'), {'scales': [2.75e-5] * 7, 'offsets': [-0.2] * 7}),
        ((LANDSAT_DN * 2.75e-5 - 0.2) * 1e4, {'scales': [1e-4] * 7}),
    ],
    ids=['DN', 'own scale', 'reflectance x 10,000'],
)
def test_landsat_in_any_scale_is_read_as_dn(
    tmp_path: Path, pixels: np.ndarray, stated: dict[str, Any]
) -> None:
    values, valid = read(tmp_path / 'a.tif', pixels, LANDSAT, **stated)
    np.testing.assert_allclose(values, LANDSAT_DN, rtol=1e-6)
    assert valid.all()


def test_fill_of_landsat_is_0_in_any_band(tmp_path: Path) -> None:
    pixels = LANDSAT_DN.astype('uint16')
    pixels[3, 1, 2] = 0
    _, valid = read(tmp_path / 'a.tif', pixels, LANDSAT)
    assert np.argwhere(~valid).tolist() == [[1, 2]]


@pytest.mark.parametrize('nodata', [None, 0])
def test_sea_level_is_fill_only_if_the_file_says_so(tmp_path: Path, nodata: int | None) -> None:
    pixels = np.full((1, 8, 8), 12, 'int16')
    pixels[0, 0, 0], pixels[0, 1, 1], pixels[0, 2, 2] = 0, -32768, -9999
    values, valid = read(tmp_path / 'a.tif', pixels, DEM, nodata=nodata)
    gaps = [[1, 1], [2, 2]]
    assert np.argwhere(~valid).tolist() == (gaps if nodata is None else [[0, 0], *gaps])
    np.testing.assert_array_equal(values, pixels)


def test_black_pixels_of_pictures_are_valid(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (3, 8, 8)).astype('uint8')
    pixels[:, 0] = 0
    values, valid = read(tmp_path / 'a.tif', pixels, RGB)
    np.testing.assert_array_equal(values, pixels)
    assert valid.all()


def test_named_bands_mark_the_nodata_of_each_sensor() -> None:
    bands = ['dem.elevation', 'landsat.B02', 'rgb.red', 's2.B04']
    image = torch.full((4, 4, 4), 9000.0)
    image[2] = 7
    image[0, 0, 0], image[1, 1, 1], image[3, 2, 2], image[:, 3, 3] = -9999, 0, 0, 0
    image[0, 3, 0], image[2, 3, 0] = 0, 0
    dataset: Any = [{'image': image}]
    named = NamedBands(dataset, bands)
    sample = named[0]
    assert (~sample['valid']).nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert named.bands == ('B04', 'landsat.B02', 'dem.elevation', 'rgb.red')
    torch.testing.assert_close(sample['image'], image[[3, 1, 0, 2]])


def test_percentiles_of_any_sensor() -> None:
    bands = ('dem.elevation', 'rgb.red')
    statistics = BandStatistics(bands)
    image = np.stack([RNG.uniform(-50, 4000, (99, 99)), RNG.integers(0, 256, (99, 99))])
    statistics.update(torch.tensor(image), torch.ones(99, 99, dtype=torch.bool))
    result = statistics.result()
    for band, values, width in zip(bands, image, (0.25, 1), strict=True):
        for percent, value in result[band]['percentiles'].items():
            expected = np.percentile(values, percent, method='inverted_cdf')
            assert value == pytest.approx(expected, abs=width)
    assert [result[band]['unit'] for band in bands] == ['m', '8-bit']


@pytest.mark.parametrize(
    ('text', 'sensor', 'name'),
    [
        ('SR_B4', LANDSAT, 'landsat.B04'),
        ('B4', LANDSAT, 'landsat.B04'),
        ('LC08_L2SP_SR_B5', LANDSAT, 'landsat.B05'),
        ('B10', LANDSAT, None),
        ('ST_B10', LANDSAT, None),
        ('B8A, 865 nm', SENTINEL2_L2A, 's2l2a.B8A'),
        ('B10', SENTINEL2_L2A, None),
        ('swir16', SENTINEL2_L2A, 's2l2a.B11'),
        ('s2l2a.B11', SENTINEL2_L2A, 's2l2a.B11'),
        ('Red', RGB, 'rgb.red'),
        ('elevation in m', DEM, 'dem.elevation'),
        ('Sigma0_VV_dB', SENTINEL1, 'VV'),
        ('VV or VH', SENTINEL1, None),
        ('T32UQD_20210506_B04_10m', SENTINEL2, 'B04'),
        ('angle', SENTINEL1, None),
        ('', DEM, None),
    ],
)
def test_bands_are_found_in_descriptions(text: str, sensor: Sensor, name: str | None) -> None:
    assert band_name(text, sensor) == name


def test_photometry_is_in_physical_units_of_each_sensor() -> None:
    """Landsat: g * r + h of reflectance, whatever the offset of its DN; elevation: metres."""
    bands = bands_of(['landsat', 'dem', 'rgb'])
    mean, std = band_statistics(bands)
    raw = torch.cat([torch.tensor(LANDSAT_DN[:, 0, 0]), torch.tensor([500.0, 90, 120, 150])])
    crops = ((raw.float() - mean) / std).view(1, -1, 1, 1).expand(300, -1, 4, 4)
    torch.manual_seed(0)
    after = Photometry(bands)(crops.clone()) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    after = after[..., 0, 0].double()
    reflectance = after[:, :7] * 2.75e-5 - 0.2
    gain = reflectance / torch.tensor(REFLECTANCE[:, 0, 0])
    assert gain.min() > 0.75
    # A tenth of the reflectance of the darkest band is haze.
    assert gain.max() < 1.27 + 0.03 / REFLECTANCE[:, 0, 0].min()
    assert 0.6 < (gain[:, 0] != 1).double().mean() <= 1
    shift = after[:, 7] - 500
    assert 9 < shift.abs().max() < 10.01
    assert 0.1 < (shift.abs() < 1e-3).double().mean() < 0.3
    assert (after[:, 8:] / torch.tensor([90.0, 120, 150])).std() > 0.05


def test_elevation_is_not_blurred() -> None:
    crop = MultiCrop(bands_of(['dem', 'rgb']), 32, 16, photometry={'blur': (3.0, 3.0)})
    assert crop.blur == {'dem': (0.0, 0.0), 'rgb': (0.1, 2.0)}


def test_speckle_of_linear_power_is_multiplicative() -> None:
    looks = SensorPhotometry(looks=(8.0, 8.0))
    band = Band('HH', 0.1, 0.05)
    with kept_registry():
        register_sensor(Sensor('xb', 'X-band', (band,), 'backscatter', 'power', photometry=looks))
        torch.manual_seed(0)
        crops = torch.full((4, 1, 200, 200), (0.3 - 0.1) / 0.05)
        power = Speckle(['xb.HH'], 'xb', (8.0, 8.0), 1.0)(crops) * 0.05 + 0.1
    assert power.mean() == pytest.approx(0.3, rel=0.01)
    assert power.var() == pytest.approx(0.3**2 / 8, rel=0.05)
