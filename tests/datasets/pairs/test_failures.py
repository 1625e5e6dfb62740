import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from geofm.datasets.pairs.failures import FailureLog


def note(log: FailureLog, worker: int, count: int) -> None:
    for i in range(count):
        log.add(f'/data/{worker}/{i}.tif')


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_no_failure_is_lost_whoever_notes_it(method: str) -> None:
    log = FailureLog()
    context: Any = multiprocessing.get_context(method)
    workers = [context.Process(target=note, args=(log, i, 300)) for i in range(2)]
    for worker in workers:
        worker.start()
    note(log, 2, 300)
    for worker in workers:
        worker.join()
    expected = {f'/data/{worker}/{i}.tif' for worker in range(3) for i in range(300)}
    noted = log.read()
    assert len(noted) == 900
    assert set(noted) == expected
    assert log.read(899) == noted[899:]


def test_it_leaves_nothing_behind() -> None:
    log = FailureLog()
    file = Path(log._file)
    log.add('a')
    assert file.exists()
    del log
    gc.collect()
    assert not file.exists()
