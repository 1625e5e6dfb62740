"""`geofm doctor` on machines with various problems."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from geofm.cli import main
from geofm.commands import doctor as module
from geofm.commands.doctor import NEEDED, Finding, examine

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def attention(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, torch.dtype]]:
    """Replacement of `choose_attention` that returns its arguments."""
    asked: list[tuple[torch.device, torch.dtype]] = []

    def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        asked.append((device, dtype))
        return f'method{len(asked)}', f'reason {len(asked)}'

    monkeypatch.setattr('geofm.models.choose_attention', choose_attention)
    return asked


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_json_lists_versions_devices_and_attention(capsys: pytest.CaptureFixture[str]) -> None:
    main(['doctor', '--json'])
    out, err = capsys.readouterr()
    assert err == ''
    found = {finding['name']: finding for finding in json.loads(out)}
    for name in NEEDED:
        assert found[name]['value'] == importlib.metadata.version(name)
    assert {'geofm', 'python', 'GDAL', 'PROJ', 'CPU', 'cache', 'open files'} <= set(found)
    assert f'{torch.get_num_threads()} threads' in found['CPU']['value']
    assert found['CPU, float32']['value'] == 'method1: reason 1'


def test_the_table_says_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('COLUMNS', '200')
    main(['doctor'])
    text = capsys.readouterr().out
    for name, finding in by_name(examine()).items():
        assert f' {name} ' in text
        if finding.topic in ('version', 'device'):
            assert f' {finding.value} ' in text
    assert ' method1: reason 1 ' in text
    # Commands to copy are not wrapped.
    assert text.splitlines()[-1].startswith(('xformers: for CUDA: ', '└'))


def test_it_prints_no_warnings_in_a_new_process() -> None:
    """Importing xformers logs and warns if its extension does not load; the command does not."""
    code = (
        'import geofm.models as module;'
        'module.choose_attention = lambda *_: ("sdpa", str(__import__("xformers.ops")));'
        'from geofm.cli import main; main(["doctor", "--json"])'
    )
    pytest.importorskip('xformers')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == ''
    assert json.loads(done.stdout)


def test_a_missing_required_package_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, 'NEEDED', (*NEEDED, 'no-such-package'))
    monkeypatch.setattr(module, 'OPTIONAL', ('no-such-option',))
    with pytest.raises(SystemExit) as error:
        main(['doctor', '--json'])
    assert error.value.code == 1
    found = {finding['name']: finding for finding in json.loads(capsys.readouterr().out)}
    assert found['no-such-package']['status'] == 'broken'
    assert found['no-such-package']['advice'] == 'pip install no-such-package'
    assert found['no-such-option']['status'] == 'warning'
    assert [f['name'] for f in found.values() if f['status'] == 'broken'] == ['no-such-package']


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'kornia', None)
    broken = by_name(examine())['kornia']
    assert broken.status == 'broken'
    assert 'kornia' in broken.value
    assert broken.advice.startswith('pip install --force-reinstall kornia==')


def test_a_failing_check_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Finding]:
        raise OSError('first line\nsecond line')

    monkeypatch.setattr(module, '_devices', fail)
    found = by_name(examine())
    assert found['device'] == Finding('device', 'device', 'OSError: first line', 'broken')
    assert found['open files'].status in ('ok', 'warning')


@pytest.mark.parametrize('capability', [(9, 0), (7, 5)])
def test_gpus(
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    attention: list[tuple[torch.device, torch.dtype]],
) -> None:
    """Simulated GPUs: their description, and the attention that is chosen."""
    major, minor = capability
    seen = SimpleNamespace(name='A100', total_memory=80 * 2**30, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda index: seen)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda index: None)

    def no_driver(*size: int, device: str) -> torch.Tensor:
        raise RuntimeError('CUDA driver version is insufficient\nand more')

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'ones', no_driver)
        broken = by_name(examine())['GPU 0']
    assert broken.status == 'broken'
    assert broken.advice == (
        'a test computation failed: RuntimeError: CUDA driver version is insufficient'
    )
    attention.clear()
    zeros = torch.zeros
    monkeypatch.setattr(torch, 'ones', lambda *size, device: zeros(*size))
    found = by_name(examine())
    half = 'bf16' if major >= 8 else 'no bf16, so use 16-mixed'
    assert found['GPU 0'].value == f'A100, 80 GiB, sm_{major}{minor}, {half}'
    dtype = torch.bfloat16 if major >= 8 else torch.float16
    gpu = torch.device('cuda', 0)
    assert attention == [
        (torch.device('cpu'), torch.float32),
        (gpu, dtype),
        (gpu, torch.float32),
    ]


def xformers_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation of xformers whose extension cannot be loaded."""
    (folder / 'xformers').mkdir()
    (folder / 'xformers' / '__init__.py').touch()
    (folder / 'xformers' / '_C.so').touch()
    spec = SimpleNamespace(origin=str(folder / 'xformers' / '__init__.py'))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name: spec if name == 'xformers' else find_spec(name)
    )

    def load_library(path: str) -> None:
        cause = OSError('libcudart.so.12: cannot open shared object file: No such file')
        raise OSError(f'Could not load this library: {path}') from cause

    monkeypatch.setattr(torch.ops, 'load_library', load_library)


def test_the_advice_for_xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xformers_at(tmp_path, monkeypatch)
    (finding,) = module._xformers(cuda=True)
    assert finding.status == 'warning'
    assert finding.value.startswith('does not load: libcudart.so.12: cannot open')
    assert 'pip install nvidia-cuda-runtime-cu12 and export LD_LIBRARY_PATH=' in finding.advice
    # Without a GPU it is not used.
    assert module._xformers(cuda=False)[0].status == 'ok'
    # If the package is installed, the advice contains its folder.
    library = tmp_path / 'nvidia' / 'cuda_runtime' / 'lib' / 'libcudart.so.12'
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = module._xformers(cuda=True)
    assert finding.advice == (f'for CUDA: export LD_LIBRARY_PATH={library.parent}:$LD_LIBRARY_PATH')


def test_a_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'new'))
    assert module._cache() == Finding('system', 'cache', f'{tmp_path}/new/geofm is writable')
    assert not (tmp_path / 'new').exists()
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    finding = module._cache()
    assert finding.status == 'warning'
    assert 'XDG_CACHE_HOME' in finding.advice


def test_little_shared_memory_and_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=64 * 2**20, total=64 * 2**20)
    monkeypatch.setattr('shutil.disk_usage', lambda folder: usage)
    (finding,) = module._shared_memory(Path.cwd())
    assert (finding.status, finding.value) == ('warning', '0.1 of 0.1 GiB free')
    assert '--shm-size' in finding.advice
    monkeypatch.setattr('resource.getrlimit', lambda which: (256, 4096))
    (finding,) = module._open_files()
    assert (finding.status, finding.advice) == ('warning', 'ulimit -n 1024')


def test_proj_without_its_data(tmp_path: Path) -> None:
    """With two installations of PROJ, the variable of one misleads the other."""
    code = 'from geofm.commands.doctor import _geography as g; print([f.status for f in g()])'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PROJ_DATA': str(tmp_path)}
    environment |= {'PROJ_LIB': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "['ok', 'broken']"
    assert done.stderr == ''
