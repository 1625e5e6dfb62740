import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import rasterio

from geofm.sample import DEFAULT_ROIS, LAND_COVER, files, write_sample_data, writer
from geofm.sample.classes import class_value
from geofm.sample.scene import LOOKS
from geofm.sen12ms import split_of
from geofm.sensors import SENTINEL2

SIZE = 64
NAME = re.compile(
    r'(ROIs\d{4})/(\d+)/(S1|S2)/(\d+)/'
    r'(s1|s2)_(ROIs\d{4})_(\d+)_ImgNo_(\d+)_(\d{4}-\d{2}-\d{2})_patch_(\d+)\.tif'
)

type Array = npt.NDArray[Any]


@pytest.fixture(scope='module')
def root(module_path: Path) -> Path:
    path = module_path / 'data'
    summary = write_sample_data(path, size=SIZE)
    assert (summary.patches, summary.pairs) == (14 * 4, 14 * 4 * 4)
    return path


def read(path: Path) -> Array:
    with rasterio.open(path) as src:
        pixels: Array = src.read()
    return pixels


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob('*') if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def clear_pairs(root: Path) -> Iterator[tuple[Array, Array, Array, str]]:
    """S1, S2, land cover and the S2 date of the pairs without clouds."""
    scenes = pd.read_csv(root / 'scenes.csv')
    for scene in scenes[scenes.cloud_cover == 0].itertuples():
        folder = root / str(scene.season) / str(scene.roi)
        place = f'{scene.season}_{scene.roi}'
        rest = f'patch_{scene.patch}.tif'
        step = str(scene.time_step)
        s1 = folder / 'S1' / step / f's1_{place}_ImgNo_{step}_{scene.s1_date}_{rest}'
        s2 = folder / 'S2' / step / f's2_{place}_ImgNo_{step}_{scene.s2_date}_{rest}'
        land_cover = read(folder / 'LC' / f'lc_{place}_{rest}')[0]
        yield read(s1), read(s2), land_cover, str(scene.s2_date)


def test_names_agree_with_folders_and_every_scene_has_its_pair(root: Path) -> None:
    sensors: dict[tuple[str, ...], dict[str, date]] = defaultdict(dict)
    for path in root.rglob('S[12]/*/*.tif'):
        match = NAME.fullmatch(path.relative_to(root).as_posix())
        assert match, path
        season, roi, folder, step, sensor, *rest = match.groups()
        assert (season, roi, step) == tuple(rest[:3])
        assert folder == sensor.upper()
        sensors[season, roi, step, rest[4]][sensor] = date.fromisoformat(rest[3])
    assert len(sensors) == 14 * 4 * 4
    gaps = {abs((days['s1'] - days['s2']).days) for days in sensors.values()}
    assert min(gaps) >= 1
    assert max(gaps) <= 5
    assert {day.year for days in sensors.values() for day in days.values()} == {2018}


def test_every_time_step_of_a_region_has_its_own_dates(root: Path) -> None:
    for _, scenes in pd.read_csv(root / 'scenes.csv').groupby(['season', 'roi']):
        steps = scenes.groupby('time_step')[['s1_date', 's2_date']].agg(['nunique', 'first'])
        assert (steps.xs('nunique', axis=1, level=1) == 1).to_numpy().all()
        assert steps['s2_date', 'first'].is_monotonic_increasing
        assert steps['s2_date', 'first'].nunique() == 4
        assert steps['s1_date', 'first'].nunique() == 4


@pytest.mark.parametrize(
    ('glob', 'dtype', 'count'), [('S1/*/*.tif', 'float32', 2), ('S2/*/*.tif', 'uint16', 13)]
)
def test_format_is_that_of_the_real_files(root: Path, glob: str, dtype: str, count: int) -> None:
    with rasterio.open(next(root.rglob(glob))) as src:
        assert (src.count, src.shape, set(src.dtypes)) == (count, (SIZE, SIZE), {dtype})
        assert src.crs.to_epsg() == 4326
        assert (src.transform.a, src.transform.e) == (8.983152841195215e-05, -8.983152841195215e-05)
        assert (src.transform.b, src.transform.d) == (0, 0)
        assert src.nodata is None
        assert src.profile['interleave'] == 'pixel'
        assert 'compress' not in src.profile
        assert not src.profile['tiled']


def test_format_is_that_of_a_real_file(root: Path, shared_data: Path) -> None:
    real = next((shared_data / 'real' / 'sen12mscrts_series_oriolac').glob('s2_*.tif'))
    keys = ('driver', 'dtype', 'nodata', 'count', 'crs', 'tiled', 'interleave', 'compress')
    with rasterio.open(real) as a, rasterio.open(next(root.rglob('S2/*/*.tif'))) as b:
        assert {k: a.profile.get(k) for k in keys} == {k: b.profile.get(k) for k in keys}
        assert (a.transform.a, a.transform.e) == (b.transform.a, b.transform.e)


def test_patches_are_adjacent_with_twenty_per_row(root: Path) -> None:
    with rasterio.open(next(root.rglob('lc_ROIs1868_36_patch_0.tif'))) as src:
        origin, pixel = src.transform, src.transform.a
    numbers = set()
    for path in root.rglob('*_ROIs1868_36_*.tif'):
        number = int(path.stem.rsplit('_', 1)[1])
        numbers.add(number)
        with rasterio.open(path) as src:
            np.testing.assert_allclose(
                (~origin @ (src.transform.c, src.transform.f)),
                (number % 20 * SIZE, number // 20 * SIZE),
                atol=1e-6,
            )
            assert src.transform.a == pixel
    assert numbers == {0, 1, 20, 21}


def test_the_default_rois_are_in_all_splits() -> None:
    counts = pd.Series([split_of(*roi) for roi in DEFAULT_ROIS]).value_counts()
    assert counts.to_dict() == {'train': 8, 'val': 3, 'test': 3}


def test_values_range_as_in_the_real_data(root: Path) -> None:
    s1 = np.concatenate([read(path).ravel() for path in root.rglob('S1/*/*.tif')])
    s2 = np.stack([read(path) for path in root.rglob('S2/*/*.tif')])
    assert np.isfinite(s1).all()
    assert 0.8 < ((s1 > -25) & (s1 < 0)).mean() < 1
    assert s1.min() < -30
    assert s1.max() > 3
    assert s2.min() > 0
    assert np.percentile(s2[:, 1], 99.9) > 10_000
    assert s2.max() < 28_000
    # The dispersion of bands is that of real scenes with some clouds: visible 800 to 3000 DN.
    assert 800 < s2[:, 3].std() < 3000
    assert s2[:, SENTINEL2.band_names.index('B10')].mean() < 300


def test_some_dates_are_cloudy_as_the_table_states(root: Path) -> None:
    scenes = pd.read_csv(root / 'scenes.csv')
    covers = scenes.groupby(['season', 'roi', 'time_step']).cloud_cover.mean()
    assert 0.2 < ((covers > 0.05) & (covers < 0.8)).mean() < 0.5
    assert 0.02 < (covers > 0.8).mean() < 0.25
    scene = scenes.loc[scenes.cloud_cover.between(0.2, 0.8)].iloc[0]
    s2 = read(
        next(
            root.glob(f'{scene.season}/{scene.roi}/S2/{scene.time_step}/*_patch_{scene.patch}.tif')
        )
    )
    assert abs((s2[1] > 3500).mean() - scene.cloud_cover) < 0.1


def test_land_cover_map_has_names_and_colours_and_all_classes(root: Path) -> None:
    shares = np.zeros(len(LAND_COVER))
    for path in root.rglob('LC/*.tif'):
        with rasterio.open(path) as src:
            assert (src.count, src.dtypes[0], src.shape) == (1, 'uint8', (SIZE, SIZE))
            tags, colors = src.tags(), src.colormap(1)
            shares += np.bincount(src.read().ravel(), minlength=len(shares))
        for i, land_cover in enumerate(LAND_COVER):
            assert tags[f'CLASS_{i}'] == land_cover.name
            assert colors[i] == (*land_cover.color, 255)
    assert shares.sum() == 14 * 4 * SIZE**2
    assert (shares / shares.sum() > 0.04).all()


def test_both_sensors_agree_with_the_map(root: Path) -> None:
    red, nir = (SENTINEL2.band_names.index(band) for band in ('B04', 'B08'))
    backscatter = defaultdict(list)
    ndvi = defaultdict(list)
    for s1, s2, land_cover, day in clear_pairs(root):
        s2 = s2.astype(float)
        index = (s2[nir] - s2[red]) / (s2[nir] + s2[red])
        for value in np.unique(land_cover):
            name = LAND_COVER[value].name
            backscatter[name].append((10 ** (s1[:, land_cover == value] / 10)).mean(axis=1))
            ndvi[name, 4 <= int(day[5:7]) <= 6].append(index[land_cover == value].mean())
    vv, vh = (
        {name: np.mean(values, axis=0)[i] for name, values in backscatter.items()} for i in range(2)
    )
    assert min(vv, key=lambda name: vv[name]) == 'water'
    assert min(vh, key=lambda name: vh[name]) == 'water'
    assert max(vv, key=lambda name: vv[name]) == 'town'
    assert vv['wetland'] > 1.5 * vv['forest']
    spring = {name: np.mean(values) for (name, april), values in ndvi.items() if april}
    rest = {name: np.mean(values) for (name, april), values in ndvi.items() if not april}
    assert spring['forest'] > 0.4
    assert spring['water'] < 0
    assert spring['winter crops'] > spring['summer crops'] + 0.2
    assert rest['winter crops'] < spring['winter crops'] - 0.2


def test_patches_of_a_region_continue_each_other(root: Path) -> None:
    same = []
    for left in root.rglob('LC/*_patch_0.tif'):
        right = left.with_name(left.name.replace('patch_0', 'patch_1'))
        same.append((read(left)[0, :, -1] == read(right)[0, :, 0]).mean())
    shuffled = [
        (read(a)[0, :, -1] == read(b)[0, :, 0]).mean()
        for a, b in pairwise(sorted(root.rglob('LC/*_patch_0.tif')))
    ]
    assert np.mean(same) > 0.85
    assert np.mean(shuffled) < 0.4


def test_speckle_has_the_looks_of_the_product(root: Path) -> None:
    water = class_value('water')
    samples = []
    for path in root.rglob('LC/*.tif'):
        inside = read(path)[0] == water
        if inside.sum() > 400:
            number = path.stem.rsplit('_', 1)[1]
            for s1 in path.parents[1].glob(f'S1/*/*_patch_{number}.tif'):
                power = 10 ** (read(s1)[:, inside] / 10)
                samples.append(power.std(axis=1) / power.mean(axis=1))
    assert len(samples) > 10
    np.testing.assert_allclose(np.mean(samples, axis=0), LOOKS**-0.5, rtol=0.03)


def test_same_seed_gives_the_same_bytes_whatever_else_is_written(tmp_path: Path) -> None:
    rois = DEFAULT_ROIS[:2]
    for name, some, seed in (('a', rois, 3), ('b', rois[::-1], 3), ('c', rois[:1], 4)):
        write_sample_data(
            tmp_path / name, some, patches_per_roi=2, time_steps=2, size=32, seed=seed
        )
    a, b, c = (contents(tmp_path / name) for name in 'abc')
    tifs = {name for name in a if name.endswith('.tif')}
    assert len(tifs) == 2 * 2 * (2 * 2 + 1)
    assert {name: a[name] for name in tifs} == {name: b[name] for name in tifs}
    assert not any(a[name] == c.get(name) for name in tifs)
    write_sample_data(tmp_path / 'd', rois, patches_per_roi=2, time_steps=2, size=32, seed=3)
    assert contents(tmp_path / 'd') == a


def test_writing_again_reuses_existing_data(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {'rois': DEFAULT_ROIS[:1], 'size': 16, 'time_steps': 1}
    first = write_sample_data(tmp_path / 'data', **arguments)
    times = {path: path.stat().st_mtime_ns for path in first.path.rglob('*')}
    again = write_sample_data(tmp_path / 'data', **arguments)
    assert (first.reused, again.reused) == (False, True)
    assert first.files == again.files == len(contents(first.path)) - 1  # the manifest itself
    assert times == {path: path.stat().st_mtime_ns for path in first.path.rglob('*')}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / 'data').mkdir()
    write_sample_data(tmp_path / 'data', DEFAULT_ROIS[:1], size=16, time_steps=1)
    assert (tmp_path / 'data' / 'SOURCE.txt').read_text().startswith('GENERATED DATA')
    assert os.listdir(tmp_path) == ['data']  # noqa: PTH208


@pytest.mark.parametrize('damage', ['foreign', 'seed', 'missing', 'cut', 'manifest', 'file'])
def test_existing_files_are_never_overwritten(tmp_path: Path, damage: str) -> None:
    dest = tmp_path / 'data'
    arguments: dict[str, Any] = {'rois': DEFAULT_ROIS[:1], 'size': 16, 'time_steps': 1}
    if damage == 'file':
        dest.write_text('mine')
    elif damage == 'foreign':
        dest.mkdir()
        (dest / 'precious.txt').write_text('mine')
    else:
        write_sample_data(dest, **arguments)
        tif = next(dest.rglob('S1/*/*.tif'))
        match damage:
            case 'seed':
                arguments['seed'] = 1
            case 'missing':
                tif.unlink()
            case 'cut':
                tif.write_bytes(tif.read_bytes()[:-1])
            case 'manifest':
                (dest / 'sample.json').write_text('[]')
    before = contents(dest) if dest.is_dir() else dest.read_text()
    with pytest.raises(ValueError, match=r'data: .*nothing was written'):
        write_sample_data(dest, **arguments)
    assert before == (contents(dest) if dest.is_dir() else dest.read_text())
    assert os.listdir(tmp_path) == ['data']  # noqa: PTH208


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.write_raster
    written = []

    def interrupted(path: Path, *args: Any) -> None:
        write(path, *args)
        written.append(path)
        if len(written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, 'write_raster', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_sample_data(tmp_path / 'new' / 'data', DEFAULT_ROIS[:1], size=16)
    assert len(written) == 5
    assert not any((tmp_path / 'new').iterdir())


@pytest.mark.parametrize(
    'arguments',
    [
        {'rois': []},
        {'rois': [('ROIs2017', 32), ('ROIs2017', 32)]},
        {'rois': [('ROIs2017', 1)]},
        {'patches_per_roi': 0},
        {'patches_per_roi': 401},
        {'time_steps': 31},
        {'size': 8},
        {'seed': -1},
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'rois|regions|must be'):
        write_sample_data(tmp_path / 'data', **arguments)
    assert not any(tmp_path.iterdir())


def test_source_and_manifest_describe_the_data(root: Path) -> None:
    manifest = json.loads((root / 'sample.json').read_text())
    assert (manifest['seed'], manifest['size'], len(manifest['rois'])) == (0, SIZE, 14)
    files = contents(root)
    assert manifest['files'] == {k: len(v) for k, v in files.items() if k != 'sample.json'}
    text = (root / 'SOURCE.txt').read_text()
    assert 'GENERATED' in text
    assert 'seed 0' in text
