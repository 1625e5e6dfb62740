import json
import shutil
from pathlib import Path

import pytest
import yaml

from geofm.cli import main
from geofm.datasets import SEN12MSCRTS
from geofm.datasets.catalogue.catalogue import beside, find_catalogue
from geofm.sensors import BANDS
from tests.datasets.catalogue.test_catalogue import KEY
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
