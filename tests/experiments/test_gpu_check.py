"""The checks for a GPU, run through at sizes that any machine has time for."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    # A compiler takes its time, and is not always there.
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: compile_(f, backend='eager', **kw))
    yield importlib.import_module('gpu_check')
    del sys.modules['gpu_check']


def test_every_section_runs_and_a_failure_loses_no_other(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(setting: Any) -> dict[str, Any]:
        raise RuntimeError('no such kernel')

    monkeypatch.setitem(gpu_check.SECTIONS, 'transfer', fail)
    path = tmp_path / 'check.json'
    with pytest.raises(SystemExit, match='1'):
        gpu_check.main(['--tiny', f'--output={path}'])
    found = json.loads(path.read_text())
    assert found['card'] == gpu_check.device_name(gpu_check.torch.device('cpu'))
    sections = found['sections']
    assert list(sections) == list(gpu_check.SECTIONS)
    failed = {name for name, result in sections.items() if 'error' in result}
    assert failed == {'transfer'}, sections
    assert 'no such kernel' in sections['transfer']['error']
    assert sections['training run']['finite']
    assert len(sections['training run']['losses']) == 4
    assert max(sections['losses, CPU and device']['relative_difference'].values()) < 1e-6
    assert sections['compile']['compiled']['loss'] == pytest.approx(
        sections['compile']['eager']['loss'], rel=1e-5
    )
    saved = {
        name: part['saved_gib'] for name, part in sections['memory'].items() if name != 'section_s'
    }
    assert saved['True'] < saved['False']
    assert sections['phases']['whole step']['flops'] > sections['phases']['teacher']['flops'] > 0


def test_images_that_travel_as_integers_arrive_as_they_are(gpu_check: Any) -> None:
    setting = gpu_check.Setting(gpu_check.TINY, torch.device('cpu'), 2, 64, steps=1)
    assert gpu_check.transfer(setting)['same']
