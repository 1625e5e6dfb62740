"""Memory and caches of attention of packed crops."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from geofm.models.packed_attention import _starts, attend

GROUPS = ((2, 5), (3, 2))


def test_checkpointing_drops_what_attention_starts_from() -> None:
    x = torch.randn(16, 3, 4, 8, requires_grad=True)
    kept: list[StorageWeakRef] = []

    def run(x: Tensor) -> Tensor:
        qkv = x * 1
        kept.append(StorageWeakRef(qkv.untyped_storage()))
        return attend(qkv, GROUPS).square()

    expected = run(x)
    assert not kept[0].expired()
    result = checkpoint(run, x, use_reentrant=False)
    assert isinstance(result, Tensor)
    assert kept[1].expired()
    ours, theirs = (torch.autograd.grad(part.sum(), x)[0] for part in (result, expected))
    torch.testing.assert_close(ours, theirs)


def test_what_a_validation_leaves_behind_is_good_for_training() -> None:
    _starts.cache_clear()
    with torch.inference_mode():
        _starts(GROUPS, torch.device('cpu'))
    starts, longest = _starts(GROUPS, torch.device('cpu'))
    assert not starts.is_inference()
    assert starts.tolist() == [0, 5, 10, 12, 14, 16]
    assert longest == 5


def test_half_precision_on_a_cpu_attends_in_full() -> None:
    packed = torch.randn(16, 3, 4, 8)
    half = packed.bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        ours = attend(half, GROUPS, method='sdpa')
    theirs = attend(full, GROUPS, method='sdpa')
    assert ours.dtype == torch.bfloat16
    # Nothing between is rounded: the result and the gradient are, once each.
    torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0)
    weights = torch.randn(ours.shape).bfloat16()
    (of_half,) = torch.autograd.grad(ours, half, weights)
    (of_full,) = torch.autograd.grad(theirs, full, weights.float())
    assert of_half.dtype == torch.bfloat16
    torch.testing.assert_close(of_half, of_full.bfloat16(), rtol=0, atol=0)
