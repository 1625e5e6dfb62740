import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml

from geofm.cli import main
from geofm.datasets import SEN12MSCR, SEN12MSCRTS, write_sample_scenes
from geofm.datasets.catalogue.catalogue import beside, find_catalogue
from geofm.datasets.statistics import read_statistics
from geofm.sensors import BANDS, bands_of
from tests.datasets.catalogue.test_catalogue import KEY
from tests.datasets.test_sen12mscr import write_patch
from tests.datasets.tree import grid_at, write_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for patch in range(3):
        write_pair(tmp_path / 'in', KEY._replace(patch=patch), grid_at(32632, 5e5, 5.3e6))
    write_pair(tmp_path / 'in', KEY._replace(season='ROIs2017', roi=22), grid_at(32632, 6e5, 5.3e6))
    return tmp_path / 'in'


def test_index(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(['index', str(root), '--pairs-json', str(root.parent / 'pairs.json')])
    out = capsys.readouterr().out
    assert '8 files' in out
    assert 'No problems' in out
    pairs = json.loads((root.parent / 'pairs.json').read_text())
    ds = SEN12MSCRTS(root, 'all')
    assert pairs == [list(pair) for pair in zip(ds.index['s1'], ds.index['s2'], strict=True)]
    assert len(SEN12MSCRTS(root.parent / 'pairs.json', 'val')) == 1


def test_index_prints_problems(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = next(root.rglob('s2_*_patch_1.tif'))
    bad.write_bytes(bad.read_bytes()[:-9])
    output = root.parent / 'elsewhere.parquet'
    main(['index', str(root), '--output', str(output), '--jobs', '2'])
    out = capsys.readouterr().out
    assert 'shorter than its header says' in out
    assert bad.name in out
    assert output.is_file()
    assert find_catalogue(root) is None


def test_split(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(['split', str(root), str(tmp_path / 'out'), '--copy'])
    assert 'val: 2 files' in capsys.readouterr().out
    assert not any(path.is_symlink() for path in (tmp_path / 'out').rglob('*.tif'))
    with pytest.raises(SystemExit, match=r'geofm split: .*exists'):
        main(['split', str(root), str(tmp_path / 'out')])
    shutil.rmtree(tmp_path / 'out')
    main(['split', str(root), str(tmp_path / 'out'), '--test', '0.5', '--seed', '1'])
    assert 'val: 0 files' in capsys.readouterr().out


def test_stats(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(['stats', str(root), '--output', str(tmp_path / 's.yaml')])
    content = yaml.safe_load((tmp_path / 's.yaml').read_text())
    assert list(content['bands']) == list(BANDS)
    assert content['pairs'] == 3
    assert 'VV' in capsys.readouterr().out
    assert beside(root).exists()


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """Three triplets of SEN12MS-CR."""
    for patch in range(3):
        grid = grid_at(32632, 5e5 + 320 * patch, 5.3e6)
        write_patch(tmp_path / 'cr', 'ROIs1868_summer', 36, patch, grid, ('s1', 's2', 's2_cloudy'))
    return tmp_path / 'cr'


def test_index_lists_the_pairs_of_sen12mscr(single: Path) -> None:
    listed = single.parent / 'pairs.json'
    main(['index', str(single), '--pairs-json', str(listed)])
    pairs = json.loads(listed.read_text())
    index = SEN12MSCR(single, 'all').index
    assert len(pairs) == 6
    assert pairs == [list(pair) for pair in zip(index['s1'], index['s2'], strict=True)]
    assert len(SEN12MSCR(listed, 'train')) == 6
    assert len(SEN12MSCR(listed, 'train', sky='clear')) == 3


def test_stats_of_sen12mscr(single: Path, root: Path, tmp_path: Path) -> None:
    main(['stats', str(single), '--output', str(tmp_path / 's.yaml')])
    content = yaml.safe_load((tmp_path / 's.yaml').read_text())
    assert content['pairs'] == 6
    pixels = [rasterio.open(path).read(1) for path in single.rglob('*_s1_*.tif')]
    # Each Sentinel-1 file is in two pairs.
    assert content['bands']['VV']['mean'] == pytest.approx(np.mean(pixels), rel=1e-4)
    shutil.copytree(single, root / 'cr')
    with pytest.raises(SystemExit, match='holds both SEN12MS-CR-TS and SEN12MS-CR'):
        main(['stats', str(root), '--output', str(tmp_path / 'both.yaml')])


@pytest.mark.parametrize('options', [[], ['--layout=sen12mscrts'], ['--stac']])
@pytest.mark.parametrize('name', [None, 'notes.tif', 'ROIs1868_summer_s2_36_p0.tif'])
def test_index_fails_without_a_usable_file(
    name: str | None, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / 'in'
    root.mkdir()
    if name is not None:
        (root / name).write_bytes(b'no raster')
    with pytest.raises(SystemExit) as stopped:
        main(['index', str(root), *options])
    assert stopped.value.code == 1
    assert str(root) in capsys.readouterr().err


def test_stats_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_sample_scenes(tmp_path / 'in', 'scene', dates=2, size=96)
    table = tmp_path / 'table.csv'
    rows = [
        f'{path},{path.name[:2]},{path.stem[3:]},{path.parent.name}'
        for path in sorted(root.rglob('s[12]_*.tif'))
    ]
    rows += [f'{path},dem,,{path.parent.name}' for path in sorted(root.rglob('dem.tif'))]
    table.write_text('\n'.join(['path,sensor,datetime,place', *rows]) + '\n')
    main(['stats', str(table), '--output', str(tmp_path / 's.yaml')])
    content = yaml.safe_load((tmp_path / 's.yaml').read_text())
    assert list(content['bands']) == list(bands_of(['s1', 's2', 'dem']))
    dems = sorted(root.rglob('dem.tif'))
    assert content['observations']['dem'] == len(dems)
    pixels = np.concatenate([rasterio.open(path).read(1).ravel() for path in dems])
    found = content['bands']['dem.elevation']
    assert found['mean'] == pytest.approx(pixels.mean(), rel=1e-5)
    assert found['std'] == pytest.approx(pixels.std(), rel=1e-5)
    assert found['unit'] == 'm'
    assert 'dem.elevation' in capsys.readouterr().out
    mean, std = read_statistics(tmp_path / 's.yaml', ['dem.elevation', 'B04'])
    assert mean[0] == pytest.approx(pixels.mean(), rel=1e-5)
    assert (std > 0).all()
