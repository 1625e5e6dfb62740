"""Shipped configurations are in the wheel, listed, copied, and found by name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from geofm.cli import main
from geofm.commands.configs import SHIPPED, find_config, find_configs, shipped_names

ROOT = Path(__file__).resolve().parents[1]


def test_every_configuration_of_the_repository_is_shipped() -> None:
    files = {path.resolve() for path in shipped_names().values()}
    assert files == {path for path in (ROOT / 'configs').rglob('*') if path.is_file()}


def test_they_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(['configs'])
    lines = [line.partition(' ') for line in capsys.readouterr().out.splitlines()]
    listed = {name: text.strip() for name, _, text in lines}
    assert list(listed) == list(shipped_names())
    # One sentence, whole although it contains the full stops of an abbreviation.
    assert listed['pretrain/images'] == (
        'Pretrain on RGB pictures in folders (JPEG or PNG, e.g. ImageNet): one sensor, no CRS'
    )
    main(['configs', '--copy', str(tmp_path / 'configs')])
    copied = {p.relative_to(tmp_path / 'configs') for p in (tmp_path / 'configs').rglob('*.*')}
    assert copied == {path.relative_to(SHIPPED) for path in shipped_names().values()}
    main(['configs', '--name', 'pretrain/quickstart', '--copy', str(tmp_path / 'one')])
    (one,) = (tmp_path / 'one').rglob('*.yaml')
    assert one.read_bytes() == (ROOT / 'configs' / 'pretrain' / 'quickstart.yaml').read_bytes()
    one.write_text('mine')
    with pytest.raises(SystemExit, match=r'quickstart\.yaml exists: give --copy another folder'):
        main(['configs', '--name', 'pretrain/quickstart', '--copy', str(tmp_path / 'one')])
    assert one.read_text() == 'mine'
    with pytest.raises(SystemExit, match="did you mean 'pretrain/quickstart'"):
        main(['configs', '--name', 'pretrain/quikstart'])


def test_names_are_found_and_files_take_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = str(SHIPPED / 'pretrain' / 'archive.yaml')
    for value in ('pretrain/archive', 'pretrain/archive.yaml', 'configs/pretrain/archive.yaml'):
        assert find_config(value) == shipped
    assert find_config('pretrain/nothing') == 'pretrain/nothing'
    args = ['a.ckpt', '--config', 'pretrain/archive', '--output', 'pretrain/archive']
    assert find_configs([*args, '--layout=layouts/scenes']) == [
        *('a.ckpt', '--config', shipped, '--output', 'pretrain/archive'),
        f'--layout={SHIPPED / "layouts" / "scenes.yaml"}',
    ]
    (tmp_path / 'pretrain').mkdir()
    (tmp_path / 'pretrain' / 'archive').touch()
    assert find_config('pretrain/archive') == 'pretrain/archive'


def test_fit_finds_a_configuration_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='0'):
        main(['fit', '--config', 'pretrain/quickstart', '--print_config'])
    assert 'default_root_dir: output/quickstart' in capsys.readouterr().out


def test_the_wheel_contains_them(tmp_path: Path) -> None:
    pytest.importorskip('setuptools', minversion='77', reason='builds the wheel')
    source = tmp_path / 'source'
    skipped = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'geofm', source / 'geofm', symlinks=True, ignore=skipped)
    shutil.copytree(ROOT / 'configs', source / 'configs')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    build = f'from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))'
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-c', build], cwd=source, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        held = {name for name in wheel.namelist() if name.startswith('geofm/configs/')}
        link = wheel.infolist()[wheel.namelist().index('geofm/configs/pretrain/quickstart.yaml')]
        assert link.file_size > 1000
    assert held == {
        f'geofm/configs/{p.relative_to(SHIPPED).as_posix()}' for p in shipped_names().values()
    }
