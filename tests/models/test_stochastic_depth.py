"""Stochastic depth in a whole student draws subsets per branch, block and crop size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from geofm.models import MultiSensorViT, View
from geofm.models.packed import draw_subset

SMALL: dict[str, Any] = {
    'img_size': 32,
    'patch_size': 8,
    'embed_dim': 32,
    'depth': 3,
    'num_heads': 4,
    'init_values': 0.5,
}


@pytest.mark.parametrize('fusion', ['linear', 'xattn'])
@pytest.mark.parametrize('rate', [0.05, 0.4])
def test_every_branch_draws_its_own_subset_of_each_size(
    fusion: Any, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MultiSensorViT(**SMALL, fusion=fusion, drop_path_rate=rate).train()
    drawn: list[tuple[int, float, Tensor]] = []

    def spy(count: int, rate: float) -> Tensor:
        subset = draw_subset(count, rate)
        drawn.append((count, rate, subset))
        return subset

    monkeypatch.setattr('geofm.models.packed.draw_subset', spy)
    views = [
        View(torch.randn(10, 15, 32, 32), patches=torch.arange(5)),
        View(torch.randn(20, 15, 16, 16)),
    ]
    model.forward_views(views)
    # Two sensors x three blocks x attention and MLP x two sizes.
    assert [(count, of) for count, of, _ in drawn] == [(10, rate), (20, rate)] * 12
    sizes = [len(subset) for _, _, subset in drawn]
    assert sizes == [max(1, int(10 * (1 - rate))), int(20 * (1 - rate))] * 12
    # No two branches draw the same: 12 x 2 draws of which chance repeats next to none.
    if rate > 0.1:
        assert len({tuple(subset.tolist()) for _, _, subset in drawn}) == len(drawn)

    drawn.clear()
    model.eval().forward_views(views)
    assert not drawn


def test_last_block_keeps_the_mean() -> None:
    """The last block scales tokens of its branches: B / |S| if kept, 0 if dropped."""
    torch.manual_seed(0)
    one_block = {**SMALL, 'depth': 1, 'sensors': ['s2'], 'in_chans': 13, 'init_values': 1e-3}
    model = MultiSensorViT(**one_block, drop_path_rate=0.5).train()
    still = MultiSensorViT(**one_block)
    still.load_state_dict(model.state_dict())
    views = [View(torch.randn(4, 13, 32, 32)), View(torch.randn(6, 13, 16, 16))]
    # Small branches, so that what follows them is nearly linear, and what they add is looked at.
    with torch.no_grad():
        for network in (model, still):
            for norm in network.modules():
                if isinstance(norm, torch.nn.LayerNorm):
                    norm.eps = 1e-6
        runs = [torch.cat([view.cls for view in model.forward_views(views)]) for _ in range(1500)]
        expected = torch.cat([view.cls for view in still.forward_views(views)])
        for gamma in (p for name, p in still.named_parameters() if name.endswith('gamma')):
            gamma.zero_()
        nothing = torch.cat([view.cls for view in still.forward_views(views)])
    added = torch.stack(runs).mean(dim=0) - nothing
    reference = expected - nothing
    assert (added - reference).norm() < 0.1 * reference.norm()
