"""What a training step does to a GPU, counted on a fake one."""

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tasks.test_dinov2 import SMALL

BENCHMARKS = Path(__file__).parents[2] / 'experiments' / 'benchmarks'


@pytest.fixture(scope='module')
def elsewhere(forkserver: ForkServerContext) -> Iterator[ProcessPoolExecutor]:
    """A process of its own: once PyTorch has seen a GPU, tests cannot fork and go backward."""
    with ProcessPoolExecutor(1, mp_context=forkserver) as pool:
        yield pool


def count(task: dict[str, Any], folder: Path, attention: str) -> list[dict[str, dict[str, int]]]:
    """Waits, and copied and pageable bytes, of three steps, by place."""
    sys.path.insert(0, str(BENCHMARKS))
    steps = importlib.import_module('gpu_step').count_steps(task, 2, 32, 3, folder, attention)
    names = ('waits', 'copied', 'pageable')
    return [{name: dict(getattr(step, name)) for name in names} for step in steps]


@pytest.mark.parametrize(
    ('fusion', 'attention', 'options'),
    [
        ('linear', 'varlen', {'grad_checkpointing': 'matmul'}),
        ('xattn', 'sdpa', {'separate_ibot_head': True, 'centering': 'sinkhorn_knopp'}),
        ('joint', 'xformers', {'drop_path_rate': 0.0, 'gram_weight': 1.0}),
    ],
)
def test_the_host_hardly_waits_and_copies_little(
    elsewhere: ProcessPoolExecutor,
    tmp_path: Path,
    fusion: str,
    attention: str,
    options: dict[str, Any],
) -> None:
    """Each operator must find its tensors on one device, too, forward and backward."""
    if attention == 'xformers':
        pytest.importorskip('xformers', reason='xformers is not installed')
    task = {**SMALL, 'model': f'geofm_vit_tiny_patch16_{fusion}', 'check_every_n_batches': 2}
    task['model_args'] = {**SMALL['model_args'], 'depth': 1}
    steps = elsewhere.submit(count, {**task, **options}, tmp_path, attention).result()
    # The host looks at every other step, and learns all that it wants to know at once.
    assert [sum(step['waits'].values()) for step in steps] == [1, 0, 1]
    for step in steps:
        beside = {place: n for place, n in step['copied'].items() if not place.endswith('batch_to')}
        assert sum(beside.values()) < 1e6
        assert not sum(n for place, n in step['pageable'].items() if place in beside)


def test_what_waits_is_counted(elsewhere: ProcessPoolExecutor) -> None:
    assert elsewhere.submit(traffic).result() == {
        'waits': 6,
        'copied': 16 + 3 * 8,
        'pageable': 16 + 2 * 8,
    }


def traffic() -> dict[str, int]:
    """What a fake GPU counts of some copies and looks at it."""
    sys.path.insert(0, str(BENCHMARKS))
    with importlib.import_module('fake_gpu').fake_gpu() as gpu:
        on_device = torch.arange(4, device='cuda')
        assert not gpu.traffic.waits
        on_device.sum().item()
        on_device.cpu()
        torch.tensor([1, 2], device='cuda')
        torch.ones(2).to('cuda')
        torch.ones(2).to('cuda', non_blocking=True)
        torch.ones(2).pin_memory().to('cuda', non_blocking=True)
        for choose in (lambda: on_device[on_device > 0], lambda: on_device.nonzero()):
            with pytest.raises(NotImplementedError, match='on the device'):
                choose()
        with pytest.raises(RuntimeError, match='cuda:0 and cpu'):
            on_device + torch.ones(4)
    names = ('waits', 'copied', 'pageable')
    return {name: sum(getattr(gpu.traffic, name).values()) for name in names}
