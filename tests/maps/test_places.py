"""Tables of embeddings, and search in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from matplotlib.figure import Figure
from pyproj import Geod
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points

from geofm.grid import Grid
from geofm.maps.make.embeddings import EmbeddingTable, Precision, dimension_scales, write_embeddings
from geofm.maps.make.windows import Strip
from geofm.maps.view.places import search

from .scenes import NORTH_UP, UTM

GEOD = Geod(ellps='WGS84')
GRID = Grid(UTM, NORTH_UP @ Affine.scale(16), 9, 12)
GRIDS = {
    'utm': GRID,
    'degrees': Grid(CRS.from_epsg(4326), Affine(1e-3, 0, 20, 0, -1e-3, 60), 9, 12),
    'south-up': Grid(UTM, Affine(160, 0, 5e5, 0, 160, 4.2e6), 9, 12),
}


def _vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((6, 9, 12)).astype(np.float32)
    vectors[:, 2, 3] = np.nan
    return vectors


def _strips(vectors: np.ndarray) -> Iterator[Strip]:
    for part in np.array_split(vectors, 4, axis=1):
        yield Strip(part, np.isfinite(part).all(axis=0))


def _write(path: Path, grid: Grid = GRID, precision: Precision = 'float32') -> Path:
    vectors = _vectors()
    scales = dimension_scales(_strips(vectors)).tolist() if precision == 'int8' else None
    dates = {'s1': np.datetime64('NaT', 'D'), 's2': np.datetime64('2018-02-24', 'D')}
    count = write_embeddings(
        path,
        grid,
        _strips(vectors),
        precision=precision,
        scales=scales,
        dates=dates,
        tags={'model': 'm'},
    )
    assert count == 9 * 12 - 1
    return path


def _lonlat(grid: Grid, row: float, col: float) -> tuple[float, float]:
    x, y = grid.transform @ (col, row)
    lon, lat = transform_points(grid.crs, CRS.from_epsg(4326), [x], [y])
    return lon[0], lat[0]


@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8'])
def test_geopandas_opens_the_table(tmp_path: Path, precision: Precision) -> None:
    path = _write(tmp_path / 'a.parquet', precision=precision)
    table = gpd.read_parquet(path)
    assert table.crs == 'EPSG:4326'
    vectors = np.stack(table['embedding'].to_list())
    assert vectors.dtype == precision
    about = EmbeddingTable.read(path)
    assert about.grid == GRID
    assert about.tags == {'model': 'm'}
    values = vectors.astype(np.float32) * (about.scales or 1)
    expected = _vectors()[:, table['row'], table['col']].T
    largest = np.nanmax(np.abs(_vectors()), axis=(1, 2))
    allowed = {'float32': 0, 'float16': largest / 2000, 'int8': largest / 253}[precision]
    assert (np.abs(values - expected) <= allowed).all()
    assert table['date_s2'].astype(str).unique().tolist() == ['2018-02-24']
    assert table['date_s1'].isna().all()
    field = pq.read_schema(path).field('embedding').type
    assert field.list_size == 6
    # Reading a bounding box skips the geometries of other rows.
    lon, lat = _lonlat(GRID, 4.5, 5.5)
    near = gpd.read_parquet(path)
    found = near[near.contains(shapely.Point(lon, lat))]
    assert found[['row', 'col']].to_numpy().tolist() == [[4, 5]]


@pytest.mark.parametrize('grid', GRIDS.values(), ids=GRIDS.keys())
def test_footprints_lie_on_the_patches(tmp_path: Path, grid: Grid) -> None:
    table = gpd.read_parquet(_write(tmp_path / 'a.parquet', grid))
    for row in table.itertuples():
        corners = [
            _lonlat(grid, row.row + r, row.col + c) for r, c in ((0, 0), (0, 1), (1, 1), (1, 0))
        ]
        assert row.geometry.equals_exact(shapely.Polygon(corners), 1e-9)
    bbox = pq.read_schema(tmp_path / 'a.parquet').metadata[b'geo'].decode()
    left, bottom, right, top = table.total_bounds
    assert f'"bbox": [{left}, {bottom}, {right}, {top}]' in bbox


def test_groups_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gpd.read_parquet(_write(tmp_path / 'a.parquet'))
    monkeypatch.setattr('geofm.maps.make.embeddings._GROUP_ROWS', 30)
    path = _write(tmp_path / 'b.parquet')
    assert pq.ParquetFile(path).num_row_groups == 3
    assert gpd.read_parquet(path).drop(columns='embedding').equals(whole.drop(columns='embedding'))


@pytest.mark.parametrize('grid', GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8'])
def test_search_equals_brute_force(
    tmp_path: Path, grid: Grid, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ('make.embeddings', 'view.places'):
        monkeypatch.setattr(f'geofm.maps.{module}.BATCH_ROWS', 25)
    result = search(_write(tmp_path / 'a.parquet', grid, precision), _lonlat(grid, 4.7, 5.2), top=7)
    vectors = _vectors()
    query = vectors[:, 4, 5]
    lengths = np.linalg.norm(vectors, axis=0) * np.linalg.norm(query)
    expected = np.einsum('dij,d->ij', vectors, query) / lengths
    close = {'float32': 1e-6, 'float16': 2e-3, 'int8': 2e-2}[precision]
    np.testing.assert_allclose(result.similarity, expected, atol=close)
    assert np.isnan(result.similarity[2, 3])
    places = result.places
    assert len(places) == 8
    assert places['rank'].tolist() == list(range(8))
    assert places.loc[0, ['row', 'col']].tolist() == [4, 5]
    assert places.loc[0, 'similarity'] == pytest.approx(1, abs=close)
    assert places['similarity'].is_monotonic_decreasing
    if precision == 'float32':
        best = np.argsort(-np.nan_to_num(expected, nan=-9).ravel())[:8]
        assert (places['row'] * 12 + places['col']).tolist() == best.tolist()
    for place in places.itertuples():
        lon, lat = _lonlat(grid, place.row + 0.5, place.col + 0.5)
        assert (place.longitude, place.latitude) == pytest.approx((lon, lat), abs=1e-6)
        assert place.geometry.contains(shapely.Point(lon, lat))
    first = places.iloc[0]
    metres = places.to_crs(places.estimate_utm_crs()).centroid
    np.testing.assert_allclose(places['distance'], metres.distance(metres[0]), rtol=2e-3, atol=0.1)
    assert first['distance'] == 0


def test_fewer_patches_than_requested(tmp_path: Path) -> None:
    result = search(_write(tmp_path / 'a.parquet'), _lonlat(GRID, 0.5, 0.5), top=1000)
    assert len(result.places) == 107


def test_results_are_saved(tmp_path: Path) -> None:
    result = search(_write(tmp_path / 'a.parquet'), _lonlat(GRID, 4.5, 5.5), top=3)
    for name in ('a.geojson', 'a.gpkg'):
        result.save(tmp_path / 'new' / name)
        read = gpd.read_file(tmp_path / 'new' / name)
        assert read.crs == 'EPSG:4326'
        assert read['rank'].tolist() == [0, 1, 2, 3]
        assert read['date_s2'].astype(str).str.startswith('2018-02-24').all()
    for name in ('a.png', 'a.pdf'):
        result.save(tmp_path / 'new' / name)
        assert (tmp_path / 'new' / name).stat().st_size > 5000
    with pytest.raises(ValueError, match=r'a\.txt: give a \.geojson'):
        result.save(tmp_path / 'a.txt')
    assert not list(tmp_path.glob('.*'))


def test_a_map_of_places(tmp_path: Path) -> None:
    figure = search(_write(tmp_path / 'a.parquet'), _lonlat(GRID, 4.5, 5.5), top=3).plot()
    assert isinstance(figure, Figure)
    ax = figure.axes[0]
    marks = {text.get_text(): text.get_position() for text in ax.texts}
    assert {'0', '1', '2', '3', 'N'} <= set(marks)
    # The text of a mark is in the middle of its patch.
    place = next(a for a in ax.texts if a.get_text() == '0')
    assert place.xy == (5.5, 4.5)  # type: ignore[attr-defined]


def test_invalid_places_are_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / 'a.parquet')
    cases: list[tuple[str, dict[str, Any]]] = [
        (r'a\.parquet: 0, 0 is outside the scene, which is at longitudes -3\.0', {'at': (0, 0)}),
        ('no data at', {'at': _lonlat(GRID, 2.5, 3.5)}),
        ('top=0', {'at': _lonlat(GRID, 1, 1), 'top': 0}),
    ]
    for message, kwargs in cases:
        with pytest.raises(ValueError, match=message):
            search(path, **kwargs)
    with pytest.raises(FileNotFoundError, match=r'gone\.parquet'):
        search(tmp_path / 'gone.parquet', (0, 0))
    for other in ('text', None):
        path = tmp_path / 'other.parquet'
        if other:
            path.write_text(other)
        else:
            gpd.GeoDataFrame({'a': [1]}, geometry=[shapely.Point(0, 0)]).to_parquet(path)
        with pytest.raises(ValueError, match=r'other\.parquet: not a table of embeddings'):
            search(path, (0, 0))


def test_scales_are_for_int8_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='scales are needed for int8'):
        write_embeddings(tmp_path / 'a', GRID, _strips(_vectors()), precision='int8')
    with pytest.raises(ValueError, match='scales are needed for int8'):
        write_embeddings(tmp_path / 'a', GRID, _strips(_vectors()), scales=[1.0] * 6)
    empty = Strip(np.full((3, 1, 4), np.nan, np.float32), np.zeros((1, 4), bool))
    assert dimension_scales([empty]).tolist() == [1, 1, 1]


FIJI = {
    'zone 60': Grid(CRS.from_epsg(32760), Affine(160, 0, 819_500, 0, -160, 8_174_200), 9, 12),
    'zone 1': Grid(CRS.from_epsg(32701), Affine(160, 0, 178_900, 0, -160, 8_174_200), 9, 12),
    'degrees': Grid(CRS.from_epsg(4326), Affine(2e-3, 0, 179.9891, 0, -2e-3, -16.49), 9, 12),
    'degrees west': Grid(CRS.from_epsg(4326), Affine(2e-3, 0, -180.0109, 0, -2e-3, -16.49), 9, 12),
}


@pytest.mark.parametrize('grid', FIJI.values(), ids=FIJI)
def test_a_scene_across_the_antimeridian_stays_in_one_place(tmp_path: Path, grid: Grid) -> None:
    path = _write(tmp_path / 'a.parquet', grid)
    table = gpd.read_parquet(path)
    assert table.geometry.is_valid.all()
    assert max(_widths(table)) < 0.003
    assert {'MultiPolygon', 'Polygon'} == set(table.geom_type)
    geo = json.loads(pq.read_schema(path).metadata[b'geo'])['columns']['geometry']
    west, south, east, north = geo['bbox']
    assert west > 179.9
    assert east < -179.9
    assert -16.52 < south < north < -16.48
    assert set(geo['geometry_types']) == {'MultiPolygon', 'Polygon'}
    for longitude in (180.0, -180.0, 179.9999, -179.9999):
        places = search(path, (longitude, -16.5), 20).places
        assert places['distance'].max() < 4000
        assert places['longitude'].abs().between(179.98, 180).all()
        (distance,) = GEOD.inv([longitude], [-16.5], *_first(places))[2]
        assert distance < 160
    with pytest.raises(ValueError, match=r'at longitudes 179\.9\d+ to -179\.9'):
        search(path, (0, -16.5))


def _first(places: gpd.GeoDataFrame) -> tuple[list[float], list[float]]:
    return [places['longitude'][0]], [places['latitude'][0]]


@pytest.mark.parametrize('code', [3413, 3031])
def test_a_scene_over_a_pole_stays_there(tmp_path: Path, code: int) -> None:
    """Distances, compared with those in the plane of a grid with the pole at a corner."""
    grid = Grid(CRS.from_epsg(code), Affine(160, 0, -960, 0, -160, 640), 9, 12)
    path = _write(tmp_path / 'a.parquet', grid)
    table = gpd.read_parquet(path)
    assert table.geometry.is_valid.all()
    pole = 90 if code == 3413 else -90
    # Four patches share the pole, so that each reaches it over a quarter of all longitudes.
    line = shapely.LineString([[-180, pole], [180, pole]])
    at_pole = table[table.geometry.intersects(line)]
    assert len(at_pole) == 4
    assert sum(_widths(at_pole)) == pytest.approx(360, abs=1e-6)
    places = search(path, (45.0, pole * 0.99999), 10).places
    for place in places.itertuples():
        x, y = grid.transform @ (place.col + 0.5, place.row + 0.5)
        assert place.distance < 2500
        assert abs(abs(place.latitude) - 90) * 111_700 == pytest.approx(np.hypot(x, y), rel=0.05)


def _widths(table: gpd.GeoDataFrame) -> list[float]:
    parts = table.geometry.explode().bounds
    return np.asarray(parts.maxx - parts.minx).tolist()
