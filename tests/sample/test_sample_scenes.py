"""Sample data as an archive of scenes."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform_bounds

from geofm.datasets import write_sample_data, write_sample_scenes
from geofm.sensors import SENSORS

ROIS = (('ROIs1868', 36), ('ROIs2017', 25))


@pytest.fixture(scope='module')
def scenes(module_path: Path) -> Path:
    return write_sample_scenes(module_path / 'scenes', 'scene', ROIS, 2, 96)


@pytest.fixture(scope='module')
def bands(module_path: Path) -> Path:
    return write_sample_scenes(module_path / 'bands', 'band', ROIS, 2, 96)


def test_each_place_has_both_sensors_elevation_and_land_cover(scenes: Path) -> None:
    places = [folder for folder in scenes.iterdir() if folder.is_dir()]
    assert len(places) == 2
    for place in places:
        names = {file.name[:3] for file in place.iterdir()}
        assert names == {'s1_', 's2_', 'dem', 'lan'}
        assert len(list(place.glob('s1_*.tif'))) == len(list(place.glob('s2_*.tif'))) == 2
        with rasterio.open(place / 'dem.tif') as dem, rasterio.open(place / 'land_cover.tif') as lc:
            assert dem.bounds == lc.bounds
            assert dem.crs == lc.crs
            assert dem.crs.is_projected
            assert dem.res == (30, 30)
            assert 0 < dem.read().min() < dem.read().max() < 600
            # The UTM zone is that of the place.
            west, _, east, _ = transform_bounds(dem.crs, 'EPSG:4326', *dem.bounds)
            zone = int(str(dem.crs.to_epsg())[-2:])
            assert (zone - 1) * 6 - 180 <= west < east <= zone * 6 - 180 + 0.1


def test_bands_are_named_and_one_file_per_band_holds_means_of_them(
    scenes: Path, bands: Path
) -> None:
    whole = next(scenes.rglob('s2_*.tif'))
    with rasterio.open(whole) as src:
        assert src.descriptions == SENSORS['s2'].band_names
        image = src.read().astype(float)
        bounds = src.bounds
    for i, (name, side) in enumerate((('B02', 10), ('B05', 20), ('B09', 60))):
        part = bands / whole.relative_to(scenes).with_name(f'{whole.stem}_{name}.tif')
        with rasterio.open(part) as src:
            assert src.res == (side, side)
            assert src.bounds == bounds
            values = src.read(1)
        pixels = image[SENSORS['s2'].band_names.index(name)]
        factor = side // 10
        for row, col in ((0, 0), (3, 5)):
            block = pixels[row * factor : (row + 1) * factor, col * factor : (col + 1) * factor]
            assert values[row, col] == np.rint(block.mean()), i


def test_the_same_arguments_give_the_same_bytes_and_others_are_refused(
    scenes: Path, tmp_path: Path
) -> None:
    again = write_sample_scenes(tmp_path / 'again', 'scene', ROIS, 2, 96)
    for file in scenes.rglob('*.tif'):
        assert (again / file.relative_to(scenes)).read_bytes() == file.read_bytes()
    assert write_sample_scenes(scenes, 'scene', ROIS, 2, 96) == scenes
    with pytest.raises(ValueError, match='holds other sample data'):
        write_sample_scenes(scenes, 'band', ROIS, 2, 96)
    with pytest.raises(ValueError, match='holds other sample data'):
        write_sample_data(scenes)
    with pytest.raises(ValueError, match='multiple of 6'):
        write_sample_scenes(tmp_path / 'other', size=100)
