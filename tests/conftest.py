import gc
import multiprocessing
import shutil
from collections.abc import Iterator
from multiprocessing import forkserver as server
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

#: Files that take longest or mostly wait, for SLURM or a browser. They are run first, so that no
#: process is left with one of them at the end.
FIRST = (
    'test_submit.py',
    'test_page_classes.py',
    'test_deploy.py',
    'tasks/test_ranks.py',
    'test_doors.py',
    'test_page_browser.py',
    'test_archive_docs.py',
    'test_benchmark.py',
    'test_adapt.py',
    'tasks/test_processes.py',
    'test_products.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first."""

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, name in enumerate(FIRST) if path.endswith(f'/{name}')), len(FIRST))

    items.sort(key=place)


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Folder of real data beside the repository, if there is one."""
    path = Path(__file__).resolve().parents[2] / 'shared' / 'data'
    if not path.is_dir():
        pytest.skip('needs the real data of ../shared/data, which is not there')
    return path


@pytest.fixture(scope='module')
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder that the tests of a module share, removed after the last of them."""
    folder = tmp_path_factory.mktemp('module')
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope='session')
def forkserver() -> ForkServerContext:
    """Context of new processes, which pickle their arguments and start with geofm imported.

    They are forked from a process that has only imported it: importing takes seconds, and the
    process of the tests has threads, e.g. of GDAL and autograd.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['geofm.tasks', 'geofm.maps'])
    server.ensure_running()
    return context


@pytest.fixture(scope='session', autouse=True)
def _freeze_imports() -> None:
    """Exclude the objects of imported modules from garbage collection, to save time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope='session', autouse=True)
def _autograd_before_fake_gpus() -> None:
    """Start autograd while there is no GPU, not even one of FakeTensorMode (torch.export).

    Otherwise it starts threads for that GPU, and tests that fork cannot run a backward pass.
    """
    torch.ones(1, requires_grad=True).backward()
