from pathlib import Path

import pytest
import torch


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Folder of real data beside the repository, if there is one."""
    path = Path(__file__).resolve().parents[2] / 'shared' / 'data'
    if not path.is_dir():
        pytest.skip('needs the real data of ../shared/data, which is not there')
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
