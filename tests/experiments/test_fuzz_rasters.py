"""Some of the mutated files that ``experiments/fuzz_rasters.py`` reads thousands of."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield importlib.import_module('fuzz_rasters')
    del sys.modules['fuzz_rasters']


def test_mutated_files_give_clear_errors_or_possible_values(fuzz: Any, tmp_path: Path) -> None:
    indexed = fuzz.good_pair(tmp_path)
    found = {n: fuzz.check(indexed, tmp_path, n, 1, 60) for n in range(15)}
    faults = {n: told for n, (_, _, told) in found.items()}
    assert not any(faults.values()), faults
    assert len({problem for _, problem, _ in found.values()}) > 3


def test_a_fault_is_seen(fuzz: Any) -> None:
    image = np.zeros((2, 2, 2), np.float32)
    valid = np.array([[True, False], [True, True]])
    assert not fuzz._beyond(image, valid, ('VV', 'VH'))
    image[1, 0, 1] = np.nan
    assert not fuzz._beyond(image, valid, ('VV', 'VH'))
    image[1, 1, 1] = 3e38
    assert len(fuzz._beyond(image, valid, ('VV', 'VH'))) == 1
