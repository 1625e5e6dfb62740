import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from geofm.datasets.failures import FailureLog


def note(log: FailureLog, worker: int, count: int) -> None:
    for i in range(count):
        log.add(f'/data/{worker}/{i}.tif')


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_no_failure_is_lost_whoever_notes_it(method: str) -> None:
    log = FailureLog()
    context: Any = multiprocessing.get_context(method)
    workers = [context.Process(target=note, args=(log, i, 300)) for i in range(4)]
    for worker in workers:
        worker.start()
    note(log, 4, 300)
    for worker in workers:
        worker.join()
    expected = {f'/data/{worker}/{i}.tif' for worker in range(5) for i in range(300)}
    noted = log.read()
    assert len(noted) == 1500
    assert set(noted) == expected
    assert log.read(1499) == noted[1499:]


def test_it_leaves_nothing_behind() -> None:
    log = FailureLog()
    file = Path(log._file)
    log.add('a')
    assert file.exists()
    del log
    gc.collect()
    assert not file.exists()
