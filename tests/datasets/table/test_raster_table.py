import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geofm.datasets.table import NO_TIME, Observations, RasterTable, TableError
from geofm.datasets.table.address import file_of, relative, resolve
from tests.datasets.table.rasters import write_csv

ROW = {'path': 'a.tif', 'sensor': 's2', 'datetime': '2018-02-28', 'place': 'p', 'band': ''}


def table_of(tmp_path: Path, *changes: Mapping[str, object]) -> RasterTable:
    rows = [{**ROW, **change} for change in changes]
    return RasterTable.read(write_csv(tmp_path / 'table.csv', rows))


def test_a_file_name_may_have_a_colon() -> None:
    for name in ('S2:a.tif', 'zone_31:b/c.tif', '2018-02-01T10:30:00.tif'):
        assert resolve(name, '/archive') == f'/archive/{name}'
        assert file_of(f'/archive/{name}') == f'/archive/{name}'
        assert relative(name, '/archive', '/archive/x') == f'/archive/{name}'
    for address in ('https://host/a.tif', 's3://bucket/a.tif', 's3:/bucket/a.tif', '/vsicurl/x'):
        assert resolve(address, '/archive') == address
        assert file_of(address) is None


def test_columns_are_read(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        {'sensor': 's2', 'datetime': '2018-02-28T10:15:30Z', 'scale': 0.5, 'nodata': ''},
        {'path': '/x/b.tif', 'sensor': 's1', 'datetime': '', 'place': '', 'scale': '', 'nodata': 0},
    )
    assert [table.path(i) for i in range(2)] == [str(tmp_path / 'a.tif'), '/x/b.tif']
    assert [table.sensor_of(i).name for i in range(2)] == ['s2', 's1']
    assert table.time[0] == np.datetime64('2018-02-28T10:15:30', 'us').astype(int)
    assert table.time[1] == NO_TIME
    assert table.place.tolist() == [0, -1]
    assert table.places[0] == 'p'
    assert table.scale is not None
    assert table.nodata is not None
    assert np.array_equal(table.scale, [0.5, np.nan], equal_nan=True)
    assert np.array_equal(table.nodata, [np.nan, 0], equal_nan=True)
    assert table.offset is None
    assert not table.is_scanned


@pytest.mark.parametrize('name', ['t.parquet', 't.csv', 'other/t.geoparquet'])
def test_a_table_that_is_written_reads_the_same(tmp_path: Path, name: str) -> None:
    grid = {'crs': 'EPSG:32631', 'transform': '10 0 5e5 0 -10 4e6', 'height': 7, 'width': 9}
    table = table_of(
        tmp_path,
        {'band': 'B8A', 'index': 3, 'scale': 1e-4, 'cloud_cover': 0.25, 'split': 'val', **grid},
        {'band': 'B02 - B04', 'index': '', 'scale': '', 'cloud_cover': '', 'split': '', **grid},
        {'path': '/vsizip/z.zip/a.png', 'sensor': 's1', 'index': '', 'scale': '', 'cloud_cover': ''}
        | {'split': 'test', 'crs': '', 'transform': '', 'height': 4, 'width': 5},
    )
    (tmp_path / 'other').mkdir()
    table.write(tmp_path / name)
    again = RasterTable.read(tmp_path / name)
    for field in ('sensor', 'time', 'band', 'index', 'scale', 'cloud_cover', 'epsg', 'transform'):
        assert np.array_equal(getattr(table, field), getattr(again, field), equal_nan=True), field
    for field in ('place', 'height', 'width', 'bounds', 'problem'):
        assert np.array_equal(getattr(table, field), getattr(again, field), equal_nan=True), field
    assert table.band_lists == again.band_lists
    assert [table.path(i) for i in range(3)] == [again.path(i) for i in range(3)]
    assert table.grid(0) == again.grid(0) is not None
    assert table.grid(2) is None


def test_parquet_may_have_other_types(tmp_path: Path) -> None:
    columns = pa.table(
        {
            'path': pa.array(['a.tif', 'b.tif'], pa.large_string()),
            'sensor': pa.array(['s1', 's2']).dictionary_encode(),
            'datetime': pa.array([0, None], pa.timestamp('ns', 'Europe/Paris')),
            'place': pa.array([7.0, None]),
            'index': pa.array([2.0, None]),
        }
    )
    pq.write_table(columns, tmp_path / 't.parquet')
    table = RasterTable.read(tmp_path / 't.parquet')
    assert table.time.tolist() == [0, NO_TIME]
    assert (table.places[0], table.place.tolist()) == ('7', [0, -1])
    assert table.index.tolist() == [2, -1]


WRONG = [
    ([{'sensor': 's3'}], "row 1: unknown sensor 's3'"),
    ([{}, {'sensor': ''}], 'row 2: has no sensor'),
    ([{}, {'datetime': '2018-02-30'}], "row 2: datetime '2018-02-30' is not a date"),
    ([{'path': ''}], 'row 1: has no path'),
    ([{'band': 'B99'}], "row 1: s2 has no band 'B99'"),
    ([{'band': 'B02 B02'}], 'row 1: band B02 is listed twice; remove one'),
    ([{'index': 0}], 'row 1: index 0 is not an integer'),
    ([{'index': 1, 'band': 'B02 B03'}], 'row 1: an index needs one band'),
    ([{'scale': 0}], 'row 1: scale 0 is not a finite number'),
    ([{'scale': 'x'}], "row 1: scale 'x' is not a number"),
    ([{'cloud_cover': 35}], 'row 1: cloud_cover 35 is not a fraction from 0 to 1; divide'),
    ([{'crs': 'EPSG:1'}], "row 1: crs 'EPSG:1' is not a CRS"),
    (
        [{}, {'path': 'b.tif'}],
        'row 2: s2 of place p and datetime 2018-02-28T00:00:00 is also in row 1',
    ),
    (
        [{'band': 'B02'}, {'band': 'B03'}, {'band': 'B02'}],
        'row 3: band B02 of place p and datetime 2018-02-28T00:00:00 is also in row 1 (',
    ),
]


@pytest.mark.parametrize(('rows', 'message'), WRONG)
def test_errors_of_a_table_are_one_line_that_names_the_row(
    tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    full = [{**dict.fromkeys({k: '' for r in rows for k in r}, ''), **row} for row in rows]
    full = [{k: v for k, v in row.items() if v != '' or k in rows[i]} for i, row in enumerate(full)]
    with pytest.raises(TableError) as error:
        Observations.of(table_of(tmp_path, *full))
    assert message in str(error.value)
    assert '\n' not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / 'table.csv'))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / 't.csv').write_text('path,Sensor,datetime\na.tif,s1,2018-01-01\n')
    with pytest.raises(TableError, match=r"no column 'sensor'.*did you mean 'Sensor'\?"):
        RasterTable.read(tmp_path / 't.csv')
    (tmp_path / 't.csv').write_text('')
    with pytest.raises(TableError, match='cannot be read as CSV'):
        RasterTable.read(tmp_path / 't.csv')
    with pytest.raises(FileNotFoundError, match='no such file'):
        RasterTable.read(tmp_path / 'u.csv')
    (tmp_path / 't.parquet').write_text('path')
    with pytest.raises(TableError, match='cannot be read as Parquet'):
        RasterTable.read(tmp_path / 't.parquet')


TEXTS = st.text(st.characters(codec='utf-8'), max_size=6)
VALUES = {
    'path': st.sampled_from(['a.tif', 'b.tif', 'd/c.tif', '', '\x00']) | TEXTS,
    'sensor': st.sampled_from(['s1', 's2', 's3', '']),
    'datetime': st.sampled_from(['2018-01-01', '', '20180101', '2018-01-01T00:00Z', 'x']) | TEXTS,
    'place': st.sampled_from(['', 'p', 'q', '1']) | TEXTS,
    'band': st.sampled_from(['', 'VV', 'B02', 'B02 B03', 'VV VH', '-', 'b8a']) | TEXTS,
    'index': st.sampled_from(['', '1', '2', '-1', '1e9', 'nan', '1.5']),
    'scale': st.sampled_from(['', '1', 'inf', '1e-400', 'nan']),
    'nodata': st.sampled_from(['', '0', 'nan', '-9999', 'x']),
    'crs': st.sampled_from(['', 'EPSG:4326', '32631', 'EPSG:99999999999', 'LOCAL_CS["x"]']),
    'transform': st.sampled_from(
        ['', '1 0 0 0 -1 0', 'nan 0 0 0 0 0', '1 2', '1e308 1e308 0 0 0 0']
    ),
    'height': st.sampled_from(['', '0', '5', '3000000000']),
    'west': st.sampled_from(['', '0', '200', 'inf']),
    'problem': st.sampled_from(['', 'no such file']),
}


@settings(max_examples=75, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_table_is_read_or_gives_an_error_of_one_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp('random')
    extra = data.draw(st.lists(st.sampled_from([*VALUES][3:]), unique=True))
    names = data.draw(st.permutations(['path', 'sensor', 'datetime', *extra]))
    rows = data.draw(st.lists(st.tuples(*(VALUES[n] for n in names)), max_size=4))
    quoted = [','.join('"' + v.replace('"', '""') + '"' for v in row) for row in rows]
    (folder / 't.csv').write_text('\n'.join([','.join(names), *quoted]) + '\n')
    columns = {n: pa.array([r[i] for r in rows], pa.string()) for i, n in enumerate(names)}
    pq.write_table(pa.table(columns), folder / 't.parquet')
    for file in ('t.csv', 't.parquet'):
        try:
            table = RasterTable.read(folder / file)
            observations = Observations.of(table)
        except TableError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
        else:
            assert len(observations.order) + observations.left_out == len(table) == len(rows)
            table.write(folder / 'again.parquet')
            assert len(RasterTable.read(folder / 'again.parquet')) == len(rows)


def test_observations_are_groups_of_bands(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        {'path': '2.tif', 'datetime': '2019-01-01', 'band': 'B03'},
        {'path': 'x.tif', 'sensor': 's1', 'datetime': '2018-01-01'},
        {'path': '1.tif', 'datetime': '2019-01-01', 'band': 'B02'},
        {'path': '0.tif', 'datetime': '2018-01-01', 'band': 'B02'},
        {'path': 'q.tif', 'place': 'q', 'datetime': '2018-01-01', 'band': 'B02'},
    )
    observations = Observations.of(table)
    files = [sorted(table.path(r)[-5:] for r in observations.rows(i)) for i in range(4)]
    assert files == [['x.tif'], ['0.tif'], ['1.tif', '2.tif'], ['q.tif']]
    assert observations.place.tolist() == [0, 0, 0, 1]
    assert len(observations) == 4


def test_rows_without_a_place_are_grouped_by_scene_or_folder(tmp_path: Path) -> None:
    rows = [{'path': f'{d}/{b}.tif', 'place': '', 'band': b} for d in 'xy' for b in ('B02', 'B03')]
    observations = Observations.of(table_of(tmp_path, *rows))
    assert observations.count.tolist() == [2, 2]
    scenes = [{**row, 'path': f'{i}.tif', 'scene': i // 2} for i, row in enumerate(rows)]
    assert Observations.of(table_of(tmp_path, *scenes)).count.tolist() == [2, 2]
    whole = [{'path': f'{i}.tif', 'place': ''} for i in range(3)]
    assert Observations.of(table_of(tmp_path, *whole)).count.tolist() == [1, 1, 1]


def test_a_copy_is_equal(tmp_path: Path) -> None:
    table = table_of(tmp_path, {}, {'place': 'q'})
    copy = pickle.loads(pickle.dumps(table))
    assert copy.path(1) == table.path(1)
    assert np.array_equal(copy.place, table.place)
    assert len(pickle.loads(pickle.dumps(Observations.of(table)))) == 2
    assert table.take(np.array([1])).path(0) == table.path(1)
