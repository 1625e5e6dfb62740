"""What a training step does to a GPU, counted on a fake one."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tasks.test_dinov2 import SMALL

BENCHMARKS = Path(__file__).parents[2] / 'experiments' / 'benchmarks'


@pytest.fixture(scope='module')
def modules() -> Iterator[dict[str, Any]]:
    names = ('fake_gpu', 'gpu_step', 'rounds')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            del sys.modules[name]


@pytest.mark.parametrize(
    ('fusion', 'attention', 'options'),
    [
        ('linear', 'varlen', {'grad_checkpointing': 'matmul'}),
        ('xattn', 'sdpa', {'separate_ibot_head': True, 'centering': 'sinkhorn_knopp'}),
        ('joint', 'xformers', {'drop_path_rate': 0.0, 'gram_weight': 1.0}),
    ],
)
def test_the_host_hardly_waits_and_copies_little(
    modules: dict[str, Any], tmp_path: Path, fusion: str, attention: str, options: dict[str, Any]
) -> None:
    """Each operator must find its tensors on one device, too, forward and backward."""
    if attention == 'xformers':
        pytest.importorskip('xformers', reason='xformers is not installed')
    task = {**SMALL, 'model': f'geofm_vit_tiny_patch16_{fusion}', 'check_every_n_batches': 2}
    steps = modules['gpu_step'].count_steps({**task, **options}, 2, 32, 3, tmp_path, attention)
    # The host looks at every other step, and learns all that it wants to know at once.
    assert [sum(step.waits.values()) for step in steps] == [1, 0, 1]
    for step in steps:
        beside = {place: n for place, n in step.copied.items() if not place.endswith('batch_to')}
        assert sum(beside.values()) < 1e6
        assert not sum(n for place, n in step.pageable.items() if place in beside)


def test_what_waits_is_counted(modules: dict[str, Any]) -> None:
    with modules['fake_gpu'].fake_gpu() as gpu:
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
    assert sum(gpu.traffic.waits.values()) == 6
    assert sum(gpu.traffic.copied.values()) == 16 + 3 * 8
    assert sum(gpu.traffic.pageable.values()) == 16 + 2 * 8
