import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio

from geofm.cli import main
from geofm.datasets import SEN12MSCRTS
from geofm.datasets.layouts import LAYOUTS
from geofm.datasets.table import Observations, RasterTable, read_observation
from geofm.datasets.table.indexing import index_folder
from geofm.datasets.table.layout import Layout, LayoutError
from geofm.datasets.table.scanning import scan_table
from geofm.sensors import SENSORS
from tests.datasets.table.rasters import dn, write_raster

LAYOUT = r"""
files:
  - sensor: s1
    regex: '(?P<place>\w+)/s1_(?P<date>\d{8})\.tif'
  - sensor: s2
    regex: '(?P<place>\w+)/s2_(?P<date>\d{8})_(?P<band>\w+)\.tif'
  - {sensor: dem, regex: '(?P<place>\w+)/dem\.(tif|TIFF)'}
splits: {val: ['b*'], test: c}
"""

REAL = {
    'sen1floods11_sample': r"""
files:
  - {sensor: s1, regex: '(?P<place>.*)_S1Hand\.tif', date: 2019-09-17}
  - {sensor: s2, regex: '(?P<place>.*)_S2Hand\.tif', date: 2019-09-18}
""",
    'terramind_examples': r"""
files:
  - {sensor: s1, regex: 'S1RTC/(?P<place>.*)\.tif'}
  - {sensor: s2l2a, regex: 'S2L2A/(?P<place>.*)\.tif'}
  - {sensor: dem, regex: 'DEM/(?P<place>.*)\.tif'}
""",
    'bigearthnet_example': r"""
files:
  - sensor: s1
    regex: 'S1A_IW_GRDH_1SDV_(?P<date>\d{8})T\d+_\w{5}_(?P<place>\d+_\d+)_(?P<band>V[VH])\.tif'
  - sensor: s2l2a
    regex: 'S2[AB]_MSIL2A_(?P<date>\d{8})T\d+_(?P<place>\d+_\d+)_(?P<band>B\w\w)\.tif'
""",
    'worldcereal_series': r"""
files:
  - {sensor: s1, regex: '(?P<place>\w+)/S1_GRD.*\.nc', time: timestamp}
  - {sensor: s2l2a, regex: '(?P<place>\w+)/S2_L2A_.*\.nc', time: timestamp}
""",
}


def layout_of(tmp_path: Path, text: str) -> Layout:
    file = tmp_path / 'layout.yaml'
    file.write_text(text)
    return Layout.read(file)


def test_names_are_parsed_by_regular_expressions(tmp_path: Path) -> None:
    root = tmp_path / 'data'
    for path in (
        *('a/s1_20180101.tif', 'a/s2_20180103_B02.tif', 'a/s2_20180103_B8A.tif', 'a/dem.TIFF'),
        *('a/s2_20180103_SCL.tif', 'b/s1_20180101.tif', 'c/dem.tif', 'c/notes.txt', '.x/dem.tif'),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    found = index_folder(root, layout_of(tmp_path, LAYOUT))
    table = found.table
    rows = [
        (
            table.path(i).removeprefix(f'{root}/'),
            table.sensor_of(i).name,
            table.places[int(table.place[i])],
            str(np.datetime64(int(table.time[i]), 'us').astype('datetime64[D]')),
            table.bands_of(i),
            table.splits[int(table.split[i])] if table.split is not None else None,
        )
        for i in range(len(table))
    ]
    assert rows == [
        ('a/dem.TIFF', 'dem', 'a', 'NaT', None, 'train'),
        ('a/s1_20180101.tif', 's1', 'a', '2018-01-01', None, 'train'),
        ('a/s2_20180103_B02.tif', 's2', 'a', '2018-01-03', ('B02',), 'train'),
        ('a/s2_20180103_B8A.tif', 's2', 'a', '2018-01-03', ('B8A',), 'train'),
        ('b/s1_20180101.tif', 's1', 'b', '2018-01-01', None, 'val'),
        ('c/dem.tif', 'dem', 'c', 'NaT', None, 'test'),
    ]
    assert (found.unmatched, found.example) == (1, 'c/notes.txt')
    assert (found.unknown_bands, 'SCL' in found.band_example) == (1, True)


def test_templates_combine_groups_to_place_and_date(tmp_path: Path) -> None:
    layout = layout_of(
        tmp_path,
        r"""
files:
  - sensor: s2
    regex: '(?P<y>\d{4})/(?P<d>\d+)/(?P<tile>\w+)_(?P<n>\d+)\.tif'
    place: '{tile}-{n}'
    date: '{y}-{d}'
    date_format: '%Y-%j'
""",
    )
    ((_, row),) = layout.rows('2018/32/T32_7.tif')
    assert row.place == 'T32-7'
    assert row.date is not None
    assert row.date.date().isoformat() == '2018-02-01'
    assert list(layout.rows('x/2018/32/T32_7.tif')) == []


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('- a', "a layout must have a list 'files'"),
        ('files: [{sensor: s1}]', "files, entry 1: 'regex' is missing"),
        ("files: [{sensor: s3, regex: 'a'}]", "entry 1: unknown sensor 's3'"),
        ("files: [{sensor: s1, regex: '('}]", "entry 1: regex '\\(' is not valid"),
        ("files: [{sensor: s1, regex: 'a', dat: x}]", "unknown key 'dat'; did you mean 'date'"),
        ("files: [{sensor: s1, regex: 'a', place: '{x}'}]", r'needs a group \(\?P<x>...\)'),
        ("files: [{sensor: s1, regex: '(?P<y>a)', place: '{y.z}'}]", r'needs a group \(\?P<y.z>'),
        ("files: [{sensor: s1, regex: '(?P<y>a)', place: '{y!r}'}]", "without ':' and '!'"),
        ("files: [{sensor: s1, regex: '(?P<y>a)', place: '{y'}]", 'is not a template'),
        ("files: [{sensor: s1, regex: 'a', bands: VX}]", "s1 has no band 'VX'"),
        ("files: [{sensor: s1, regex: 'a', date: 31.2.18}]", 'is not a date like'),
        ("files: [{sensor: s1, regex: 'a', scale: x}]", "scale 'x' is not a number"),
        ('files: [', 'cannot be read as YAML'),
        ('files: []\nsplit: {}', "unknown key 'split'; did you mean 'splits'"),
    ],
)
def test_errors_of_a_layout_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message) as error:
        layout_of(tmp_path, text)
    assert len(str(error.value).splitlines()) == 1


def test_a_group_that_did_not_match_is_named(tmp_path: Path) -> None:
    text = r"files: [{sensor: s1, regex: '(?P<a>\w)(?P<b>\d)?\.tif', place: '{a}_{b}'}]"
    layout = layout_of(tmp_path, text)
    ((_, row),) = layout.rows('x1.tif')
    assert row.place == 'x_1'
    with pytest.raises(LayoutError, match=r"x\.tif: '\{a\}_\{b\}' needs the group 'b'"):
        list(layout.rows('x.tif'))


def test_an_invalid_date_names_the_file(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, LAYOUT)
    with pytest.raises(LayoutError, match=r"a/s1_20181301\.tif: date '20181301' does not match"):
        list(layout.rows('a/s1_20181301.tif'))


def test_index_writes_a_scanned_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / 'data'
    pixels = write_raster(root / 'a' / 's2_20180103_B02.tif', dn((1, 8, 8)))
    write_raster(root / 'a' / 's2_20180103_B8A.tif', dn((1, 4, 4)))
    write_raster(root / 'a' / 's2_20180104_B02.tif', dn((2, 4, 4)))
    (root / 'README').touch()
    (tmp_path / 'layout.yaml').write_text(LAYOUT)
    output = tmp_path / 'table.parquet'
    main(['index', str(root), '--layout', str(tmp_path / 'layout.yaml'), '--output', str(output)])
    said = capsys.readouterr().out
    assert 'left out: 1 file that no regex of the layout matches, e.g. README' in said
    assert 'left out: 1 row: bands are not those of the sensor or the table, e.g.' in said
    assert 'without names of bands' not in said
    assert 's2: 1 observation in 2 rows, 1 place, 2018-01-03 to 2018-01-03' in said
    table = RasterTable.read(output)
    assert table.is_scanned
    values, _ = read_observation(table, Observations.of(table).rows(0), ['B02'])
    assert np.array_equal(values, pixels)


def test_index_reports_the_assumed_order_of_bands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_raster(tmp_path / 'data' / 'a_20180103.tif', dn((13, 8, 8)))
    names = SENSORS['s2'].band_names
    write_raster(tmp_path / 'data' / 'b_20180103.tif', dn((13, 8, 8)), descriptions=names)
    (tmp_path / 'layout.yaml').write_text(
        "files: [{sensor: s2, regex: '(?P<place>\\w)_(?P<date>\\d{8})\\.tif'}]"
    )
    main(['index', str(tmp_path / 'data'), '--layout', str(tmp_path / 'layout.yaml')])
    said = capsys.readouterr().out
    assert f's2: 1 file without names of bands, assumed to have {" ".join(names)}' in said
    assert 'a_20180103.tif' in said


def test_files_in_a_zip_file_are_found(tmp_path: Path) -> None:
    from PIL import Image

    picture = np.random.default_rng(0).integers(1, 255, (6, 7, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / 'p.png')
    with zipfile.ZipFile(tmp_path / 'data.zip', 'w') as archive:
        archive.write(tmp_path / 'p.png', 'train/cat/1.png')
    (tmp_path / 'p.png').unlink()
    layout = layout_of(
        tmp_path, r"files: [{sensor: rgb, regex: '.*/(?P<split>\w+)/\w+/(?P<place>\d+)\.png'}]"
    )
    table = scan_table(index_folder(tmp_path, layout).table).table
    values, valid = read_observation(table, [0])
    assert np.array_equal(values, picture.transpose(2, 0, 1))
    assert valid.all()
    assert table.splits == ('train',)
    table.write(tmp_path / 'table.csv')
    assert RasterTable.read(tmp_path / 'table.csv').path(0) == table.path(0)


def test_built_in_layouts_agree_with_the_data_sets(shared_data: Path) -> None:
    root = shared_data / 'real' / 'crts_layout'
    table = scan_table(index_folder(root, LAYOUTS['sen12mscrts']).table).table
    observations = Observations.of(table)
    data = SEN12MSCRTS(root, 'all')
    assert len(observations) == 2 * len(data)
    for i in range(len(data)):
        files = {str(f) for f in data.files_of(i)}
        found = [
            k for k in range(len(observations)) if table.path(observations.rows(k)[0]) in files
        ]
        images = [read_observation(table, observations.rows(k))[0] for k in found]
        assert np.array_equal(np.concatenate(images), data[i]['image'].numpy())
        assert len({int(observations.place[k]) for k in found}) == 1


@pytest.mark.parametrize('name', REAL)
def test_real_archives_are_tables(shared_data: Path, tmp_path: Path, name: str) -> None:
    assert len(REAL[name].strip().splitlines()) <= 15
    found = index_folder(shared_data / 'real' / name, layout_of(tmp_path, REAL[name]))
    scan = scan_table(found.table)
    assert scan.messages == {}
    observations = Observations.of(scan.table)
    for number in (0, len(observations) - 1):
        rows = observations.rows(number)
        bands = [b for r in rows for b in scan.table.bands_of(int(r)) or ()] or None
        values, valid = read_observation(scan.table, rows, bands)
        assert valid.any()
        if len(rows) == 1:
            with rasterio.open(scan.table.path(int(rows[0]))) as src:
                assert np.array_equal(values, src.read().astype(np.float32))


def test_a_series_has_a_row_of_each_date(shared_data: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip('h5py')
    root = shared_data / 'real' / 'worldcereal_series'
    table = index_folder(root, layout_of(tmp_path, REAL['worldcereal_series'])).table
    observations = Observations.of(table)
    file = next(root.glob('*/S1_GRD*.nc'))
    with h5py.File(file) as content:
        vv, stamps = content['VV'][:], content['timestamp'][:]
    first = [k for k in range(len(observations)) if table.sensors[observations.sensor[k]] == 's1']
    assert len(first) == len(stamps)
    start = np.datetime64('2017-08-01T17:32:36', 'us')
    assert (
        observations.time[first].tolist() == (start + stamps.astype('m8[s]')).astype(int).tolist()
    )
    values, _ = read_observation(table, observations.rows(first[5]), ['VV'])
    assert np.allclose(values[0], vv[5] * 1e-4, rtol=1e-6)


def test_index_reports_invalid_tables_and_stac(tmp_path: Path) -> None:
    for args in (['--layout', 'sen12'], ['--layout', 'sen12mscr', '--stac']):
        with pytest.raises(SystemExit):
            main(['index', str(tmp_path), *args])
    (tmp_path / 'x.json').write_text(json.dumps({'type': 'x'}))
    with pytest.raises(SystemExit):
        main(['index', '--stac', str(tmp_path / 'x.json')])


def test_sen12mscr_is_indexed_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / 'cr'
    for kind, pixels in (('s1', -dn((2, 8, 8)).astype(np.float32) / 500), ('s2', dn((13, 8, 8)))):
        folder = root / f'ROIs1868_summer_{kind}' / f'{kind}_36'
        write_raster(folder / f'ROIs1868_summer_{kind}_36_p30.tif', pixels)
    main(['index', str(root), '--pairs-json', str(tmp_path / 'pairs.json')])
    ((s1, s2),) = json.loads((tmp_path / 'pairs.json').read_text())
    assert 's1_36_p30' in s1
    assert 's2_36_p30' in s2
    main(['stats', str(root), '--output', str(tmp_path / 'statistics.yaml')])
    assert (tmp_path / 'statistics.yaml').is_file()
    main(['index', str(root), '--layout', 'sen12mscr', '--output', str(tmp_path / 't.csv')])
    assert 's2: 1 observation in 1 row, 1 place, no date' in capsys.readouterr().out
