import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from geofm.datasets.pairs.failures import FailureLog


def note(log: FailureLog, worker: int, count: int) -> None:
    for i in range(count):
        log.add(f'/data/{worker}/{i}.tif')


@pytest.mark.parametrize('method', ['fork', 'forkserver'])
@pytest.mark.usefixtures('forkserver')
def test_no_failure_is_lost_across_processes(method: str) -> None:
    count, log = 2, FailureLog()
    context: Any = multiprocessing.get_context(method)
    workers = [context.Process(target=note, args=(log, i, 300)) for i in range(count)]
    for worker in workers:
        worker.start()
    note(log, count, 300)
    for worker in workers:
        worker.join()
    expected = {f'/data/{worker}/{i}.tif' for worker in range(count + 1) for i in range(300)}
    noted = log.read()
    assert len(noted) == len(expected)
    assert set(noted) == expected
    assert log.read(len(noted) - 1) == noted[-1:]


def test_the_log_is_deleted() -> None:
    log = FailureLog()
    file = Path(log._file)
    log.add('a')
    assert file.exists()
    del log
    gc.collect()
    assert not file.exists()
