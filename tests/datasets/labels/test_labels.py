"""Labels on a grid, compared with rasterio and NumPy."""

import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import Affine

from geofm.datasets.labels import LabelError, read_labels, read_points
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend

GRID = Grid(CRS.from_epsg(32632), Affine(10, 0, 600000, 0, -10, 5500000), 40, 50)
POLYGONS = [
    shapely.box(600012, 5499703, 600203, 5499911),
    shapely.Polygon([(600101, 5499788), (600391, 5499650), (600333, 5499941)]),
    shapely.Point(600405, 5499605),
]


def write_features(path: Path, classes: list[object], crs: str = 'EPSG:32632') -> Path:
    frame = gpd.GeoDataFrame({'class': classes, 'area': 1.5}, geometry=POLYGONS, crs='EPSG:32632')
    frame = frame.to_crs(crs)
    frame.to_parquet(path) if path.suffix == '.parquet' else frame.to_file(path)
    return path


def write_raster(path: Path, values: np.ndarray, grid: Grid = GRID, **profile: object) -> Path:
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        height=grid.height,
        width=grid.width,
        count=1,
        dtype=values.dtype,
        crs=grid.crs,
        transform=grid.transform,
        **profile,
    ) as dst:
        dst.write(values, 1)
    return path


@pytest.mark.parametrize('name', ['l.gpkg', 'l.geojson', 'l.parquet'])
@pytest.mark.parametrize('all_touched', [False, True])
def test_features_equal_those_of_rasterio(tmp_path: Path, name: str, all_touched: bool) -> None:
    path = write_features(tmp_path / name, ['water', 'town', 'forest'])
    labels = read_labels(path, GRID, column='class', all_touched=all_touched)
    assert labels.legend.names == ('forest', 'town', 'water')
    expected = rasterize(
        zip(POLYGONS, [2, 1, 0], strict=True),
        GRID.shape,
        NO_CLASS,
        transform=GRID.transform,
        all_touched=all_touched,
        dtype='uint8',
    )
    np.testing.assert_array_equal(labels.values, expected)
    assert (labels.values == 0).sum() == 1
    assert set(np.unique(labels.values)) == {0, 1, 2, NO_CLASS}


def test_other_crs_and_legend(tmp_path: Path) -> None:
    path = write_features(tmp_path / 'l.geojson', ['water', 'town', 'town'], 'EPSG:4326')
    legend = Legend.of({'water': 7, 'town': 3})
    labels = read_labels(path, GRID, legend=legend)
    same = read_labels(write_features(tmp_path / 'l.gpkg', [7, 3, 3]), GRID)
    # Transforming to degrees and back moves corners by less than a millimetre.
    assert (labels.values != same.values).sum() <= 2
    assert labels.legend == legend
    assert same.legend.values == (3, 7)


def test_part_of_a_scene(tmp_path: Path) -> None:
    path = write_features(tmp_path / 'l.gpkg', ['a', 'b', 'c'])
    whole = read_labels(path, GRID).values
    np.testing.assert_array_equal(
        read_labels(path, GRID.crop(10, 5, 20, 30)).values, whole[10:30, 5:35]
    )


def test_features_without_class_are_left_out(tmp_path: Path) -> None:
    path = write_features(tmp_path / 'l.gpkg', [1, None, 3])
    assert set(np.unique(read_labels(path, GRID).values)) == {1, 3, NO_CLASS}


def test_raster_of_the_same_grid_is_exact(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 5, GRID.shape).astype(np.uint8)
    values[:4] = 9
    path = write_raster(tmp_path / 'm.tif', values, nodata=9)
    labels = read_labels(path, GRID)
    np.testing.assert_array_equal(labels.values, np.where(values == 9, NO_CLASS, values))
    assert labels.legend.values == (0, 1, 2, 3, 4)
    beyond = read_labels(path, GRID.crop(-3, 5, 20, 70)).values
    expected = np.full((20, 70), NO_CLASS, np.uint8)
    expected[3:, :45] = np.where(values == 9, NO_CLASS, values)[:17, 5:]
    np.testing.assert_array_equal(beyond, expected)


def test_raster_nearest(tmp_path: Path) -> None:
    coarse = Grid(GRID.crs, GRID.transform @ Affine.scale(5), 8, 10)
    values = np.random.default_rng(0).integers(0, 5, coarse.shape).astype(np.uint8)
    path = write_raster(tmp_path / 'm.tif', values, coarse)
    np.testing.assert_array_equal(read_labels(path, GRID).values, values.repeat(5, 0).repeat(5, 1))


def test_raster_legends(tmp_path: Path) -> None:
    values = np.tile(np.array([1, 3, 3, 1, 255], np.uint8), (40, 10))
    legend = Legend.of({'water': 1, 'town': {'value': 3, 'color': '#ff0000'}})
    path = write_raster(tmp_path / 'm.tif', values)
    with rasterio.open(path, 'r+') as dst:
        dst.write_colormap(1, {1: (1, 2, 3, 255), 4: (9, 9, 9, 255)})
    found = read_labels(path, GRID).legend
    assert found.values == (1, 3, 4)
    assert found.colors[1] == (1, 2, 3)
    with rasterio.open(path, 'r+') as dst:
        dst.update_tags(**legend.tags())
    assert read_labels(path, GRID).legend == legend


@pytest.mark.parametrize('name', ['p.geojson', 'p.shp'])
def test_points(tmp_path: Path, name: str) -> None:
    points = shapely.points([[9.1, 49.1], [9.2, 49.2], [9.3, 49.3]])
    frame = gpd.GeoDataFrame({'kind': ['b', 'a', 'b']}, geometry=points, crs='EPSG:4326')
    frame.to_file(tmp_path / name)
    found = read_points(tmp_path / name)
    assert found.legend.names == ('a', 'b')
    assert found.values.tolist() == [1, 0, 1]
    assert found.geometry.crs.is_geographic
    np.testing.assert_allclose(found.geometry.x, [9.1, 9.2, 9.3])


def errors(tmp_path: Path) -> dict[str, tuple[Path, dict[str, object], str]]:
    names = write_features(tmp_path / 'names.gpkg', ['a', 'b', 'c'])
    halves = write_features(tmp_path / 'halves.gpkg', [0.5, 1, 2])
    high = write_features(tmp_path / 'high.gpkg', [1, 2, 255])
    away = write_features(tmp_path / 'away.gpkg', [1, 2, 3])
    gpd.read_file(away).set_crs('EPSG:32633', allow_override=True).to_file(away)
    plain = tmp_path / 'plain.parquet'
    gpd.read_file(names).set_crs(None, allow_override=True).to_parquet(plain)
    fake = tmp_path / 'fake.gpkg'
    fake.write_text('<OGRVRTDataSource></OGRVRTDataSource>')
    empty = tmp_path / 'empty.geojson'
    empty.write_text(json.dumps({'type': 'FeatureCollection', 'features': []}))
    broken = tmp_path / 'broken.geojson'
    broken.write_text('{"type": ')
    mask = write_raster(tmp_path / 'mask.tif', np.full(GRID.shape, 300, np.uint16))
    return {
        'unknown class': (names, {'legend': Legend.of(['a', 'b'])}, "'c': not among the classes"),
        'column': (names, {'column': 'kind'}, "no column 'kind': its columns are class, area"),
        'halves': (halves, {}, r'0\.5: class values must be integers'),
        'high': (high, {}, '255: class values must be integers from 0 to 254'),
        'unknown number': (away, {'legend': Legend.of(2)}, '2, 3: not among the classes'),
        'off the grid': (away, {}, 'no label on the grid'),
        'no CRS': (plain, {}, 'no CRS'),
        'content': (fake, {}, r'not that of a \.gpkg file'),
        'empty': (empty, {}, 'no features'),
        'broken': (broken, {}, 'cannot be read as features'),
        'raster': (mask, {}, '300: class values must be integers.*rio edit-info --nodata VALUE'),
        'missing': (tmp_path / 'none.gpkg', {}, 'no such file'),
        'missing raster': (tmp_path / 'none.tif', {}, 'no such file'),
        'raster column': (mask, {'column': 'class'}, 'has no column'),
    }


def test_errors_name_the_file(tmp_path: Path) -> None:
    for path, options, message in errors(tmp_path).values():
        with pytest.raises(LabelError, match=message) as caught:
            read_labels(path, GRID, **options)  # type: ignore[arg-type]
        assert str(path) in str(caught.value)
    with pytest.raises(LabelError, match='only points can be used'):
        read_points(tmp_path / 'names.gpkg')
