"""The process that `experiments/benchmarks/map_memory.py` measures."""

import importlib
import sys
from pathlib import Path

import pytest

from geofm.sensors import DEFAULT_SENSORS

BENCHMARKS = Path(__file__).parents[2] / 'experiments' / 'benchmarks'


def test_it_maps_the_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module('map_memory')
    for key in DEFAULT_SENSORS:
        module.write_scene(tmp_path / f'{key}_2018-02-24.tif', key, 64)
    monkeypatch.setattr(sys, 'argv', ['map_memory.py', '--map', str(tmp_path), '--threads', '1'])
    module.main()
    assert {path.suffix for path in (tmp_path / 'maps').iterdir()} >= {'.tif'}
