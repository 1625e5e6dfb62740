"""Packed crops give the values and gradients of single crops."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from geofm.models import MultiSensorViT, View, ViewTokens
from geofm.models.packed import Kept, PackedBlock, draw_subset, run_block, run_last_block
from geofm.models.packed_attention import attend, choose_attention

SMALL: dict[str, Any] = {
    'img_size': 32,
    'patch_size': 8,
    'embed_dim': 32,
    'depth': 3,
    'num_heads': 4,
    'init_values': 0.5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    'linear': {},
    'xattn': {'fusion': 'xattn', 'nlayer': 2},
    's2': {'sensors': ['s2'], 'in_chans': 13},
    'early': {'fusion': 'early'},
    'joint': {'fusion': 'joint'},
    'joint, without s1': {'fusion': 'joint', 'in_chans': 13},
    'early, without s1': {'fusion': 'early', 'in_chans': 13},
    'without s1': {'bands': ['B02', 'B03'], 'in_chans': 2},
    'swiglu, qk norm': {'qk_norm': True, 'mlp_layer': 'swiglu'},
    'no registers': {'reg_tokens': 0},
}


def model(**kwargs: Any) -> MultiSensorViT:
    torch.manual_seed(0)
    if kwargs.get('mlp_layer') == 'swiglu':
        from timm.layers.mlp import SwiGLU

        kwargs = {**kwargs, 'mlp_layer': SwiGLU}
    return MultiSensorViT(**{**SMALL, **kwargs})


def views(channels: int, present: bool = False, per_sensor: bool = False) -> list[View]:
    """Make three global crops with masked patches, and five local crops."""
    masks = torch.rand(3, 16) < 0.4
    masks[0] = False
    hidden = torch.stack([masks, torch.rand(3, 16) < 0.2], dim=1) if per_sensor else masks
    dates = torch.tensor([[17500, 17510], [17600, 17610], [17700, 17690]])
    there = torch.tensor([[True, True], [False, True], [True, False]])
    wanted = masks.flatten().nonzero().squeeze(1)
    return [
        View(torch.randn(3, channels, 32, 32), dates, hidden, there if present else None, wanted),
        View(torch.randn(5, channels, 16, 16)),
    ]


def one_by_one(backbone: MultiSensorViT, views: Sequence[View]) -> list[ViewTokens]:
    tokens = []
    for view in views:
        options = {'dates': view.dates, 'masks': view.masks, 'present': view.present}
        given = {name: part for name, part in options.items() if part is not None}
        rows = [
            backbone.forward_features(
                view.image[i : i + 1], **{name: part[i : i + 1] for name, part in given.items()}
            )
            for i in range(len(view.image))
        ]
        every = torch.cat(rows)
        patches = every[:, backbone.num_prefix_tokens :].flatten(0, 1)
        wanted = patches[:0] if view.patches is None else patches[view.patches]
        tokens.append(ViewTokens(every[:, 0], wanted))
    return tokens


def gradients(backbone: nn.Module, outputs: Sequence[ViewTokens]) -> list[Tensor]:
    """Compute the gradients of a randomly weighted sum of the outputs."""
    torch.manual_seed(5)
    total = sum((part * torch.randn_like(part)).sum() for view in outputs for part in view)
    assert isinstance(total, Tensor)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('present', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_packed_crops_are_as_one_by_one(variant: str, present: bool, checkpointing: bool) -> None:
    backbone = model(**VARIANTS[variant]).train()
    backbone.set_grad_checkpointing(checkpointing)
    nn.init.normal_(backbone.mask_token)
    if present and len(backbone.sensors) < 2:
        pytest.skip('the one sensor is always present')
    crops = views(backbone.in_chans, present, per_sensor=len(backbone.encoder_bands) == 2)
    packed, expected = backbone.forward_views(crops), one_by_one(backbone, crops)
    for ours, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours.cls, theirs.cls, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.patches, theirs.patches, atol=1e-5, rtol=1e-5)
    pairs = zip(gradients(backbone, packed), gradients(backbone, expected), strict=True)
    for ours_grad, theirs_grad in pairs:
        scale = theirs_grad.abs().max().clamp_min(1)
        torch.testing.assert_close(ours_grad / scale, theirs_grad / scale, atol=1e-5, rtol=0)


def block(rate: float) -> PackedBlock:
    torch.manual_seed(0)
    return PackedBlock(16, 2, init_values=0.7, drop_path=rate).train()


def by_hand(blk: PackedBlock, crop: Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """Reference for stochastic depth: x + B / |S| * branch(x) for x in S, otherwise x."""
    for indices, norm, branch, scale in (
        (chosen[0], blk.norm1, blk.attn, blk.ls1),
        (chosen[1], blk.norm2, blk.mlp, blk.ls2),
    ):
        after = crop.clone()
        for i in indices.tolist():
            x = crop[i : i + 1]
            after[i] += (len(crop) / len(indices) * scale(branch(norm(x))))[0]
        crop = after
    return crop


def test_stochastic_depth_runs_on_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    blk = block(0.4)
    crops = torch.randn(5, 6, 16), torch.randn(4, 3, 16)
    drawn = [torch.tensor([4, 0, 1]), torch.tensor([3, 1]), torch.tensor([2, 3, 4])]
    drawn.append(torch.tensor([0, 2]))
    order = iter(drawn)
    monkeypatch.setattr('geofm.models.packed.draw_subset', lambda count, rate: next(order))
    groups = ((5, 6), (4, 3))
    results = run_block(blk, groups, *crops)
    for i, (crop, result) in enumerate(zip(crops, results, strict=True)):
        torch.testing.assert_close(result, by_hand(blk, crop, [drawn[i], drawn[i + 2]]))

    kept = Kept(torch.tensor([0, 4, 8, 3, 2, 5]), torch.tensor([0, 5, 2, 1, 3, 0]))
    order = iter(drawn)
    rows = run_last_block(blk, groups, kept, *crops)
    expected = [
        results[0][s, t] if s < 5 else results[1][s - 5, t]
        for s, t in zip(kept.sequences.tolist(), kept.tokens.tolist(), strict=True)
    ]
    torch.testing.assert_close(rows, torch.stack(expected))


def test_subsets_leave_out_the_share_that_was_asked_for() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        subset = draw_subset(10, 0.3)
        assert len(subset.unique()) == 7
        counts[subset] += 1
    torch.testing.assert_close(counts / 2000, torch.full((10,), 0.7), atol=0.05, rtol=0)
    assert len(draw_subset(3, 0.9)) == 1
    assert len(draw_subset(16, 0.3)) == 11


def test_stochastic_depth_is_for_training_and_keeps_the_mean() -> None:
    blk = block(0.5).eval()
    crop = torch.randn(4, 3, 16)
    (still,) = run_block(blk, ((4, 3),), crop)
    torch.testing.assert_close(still, blk(crop))
    # Of a branch that does not depend on what the other left, the mean is that without dropping.
    for parameter in blk.mlp.parameters():
        nn.init.zeros_(parameter)
    expected = blk(crop)
    blk.train()
    with torch.no_grad():
        mean = torch.stack([run_block(blk, ((4, 3),), crop)[0] for _ in range(3000)]).mean(dim=0)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0)


def test_rate_is_the_same_in_all_blocks() -> None:
    backbone = model(drop_path_rate=0.3)
    rates = [m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)]
    assert rates == [0.3] * 12


def test_layer_scale_does_not_vanish_in_float16() -> None:
    """Weights of 0.02 times scales of 1e-5 are near the smallest number in float16."""
    torch.manual_seed(0)
    blk = PackedBlock(64, 2, init_values=1e-5).train()
    for parameter in blk.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    # Small, so that what is added to them can be told.
    crop = 0.01 * torch.randn(4, 3, 64)
    (exact,) = run_block(blk, ((4, 3),), crop)
    with torch.autocast('cpu', torch.float16):
        (half,) = run_block(blk, ((4, 3),), crop)
    assert (half - exact).norm() < 0.01 * (exact - crop).norm()


def test_attention_stays_within_each_sequence() -> None:
    """Compare with attention over all tokens with a block-diagonal mask."""
    groups = ((2, 5), (3, 2))
    qkv = torch.randn(16, 3, 4, 8)
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate([5, 5, 2, 2, 2])])
    query, key, value = qkv.permute(1, 2, 0, 3)
    scores = (query @ key.mT) / 8**0.5
    scores = scores.masked_fill(owner[:, None] != owner, -torch.inf)
    expected = (scores.softmax(dim=-1) @ value).permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(attend(qkv, groups), expected)


@pytest.mark.parametrize('method', ['sdpa', 'varlen', 'xformers'])
def test_methods_agree_on_a_gpu(method: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip('packed attention kernels need a GPU')
    device = torch.device('cuda')
    chosen, reason = choose_attention(device, torch.bfloat16)
    groups = ((4, 149), (8, 41))
    qkv = torch.randn(4 * 149 + 8 * 41, 3, 6, 64, device=device, dtype=torch.bfloat16)
    if method not in (chosen, 'sdpa') and chosen == 'sdpa':
        pytest.skip(reason)
    result = attend(qkv, groups, method=method)
    torch.testing.assert_close(result, attend(qkv.float(), groups, method='sdpa').bfloat16())


def test_the_choice_has_a_reason() -> None:
    name, reason = choose_attention(torch.device('cpu'), torch.float32)
    assert name == 'sdpa'
    assert 'cpu' in reason


def test_attention_needs_no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    name, reason = choose_attention.__wrapped__(torch.device('cuda'), torch.float32)
    assert (name, 'xformers' in reason) == ('sdpa', True)


@pytest.mark.parametrize('kind', [*VARIANTS, 'several sensors, some missing'])
def test_visible_patches_are_those_of_a_crop_cut_out_of_a_larger_sequence(kind: str) -> None:
    """A patch that is left out has no effect, as if attention had masked it."""
    backbone = model(**VARIANTS.get(kind, {'fusion': 'joint'})).eval()
    channels = len(backbone.bands)
    present = torch.tensor([[True, True], [False, True], [True, False]])
    given = present if len(backbone.sensors) == 2 and channels == 15 else None
    torch.manual_seed(1)
    image = torch.randn(3, channels, 32, 32)
    visible = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    view = View(image, None, None, given, torch.arange(15), visible)
    (seen,) = backbone.forward_views([view])
    # The same patches in another order, and one crop at a time: nothing else may matter.
    order = torch.tensor([3, 0, 4, 1, 2])
    for i in range(3):
        part = None if given is None else given[i : i + 1]
        one = View(image[i : i + 1], None, None, part, torch.arange(5), visible[i : i + 1, order])
        (alone,) = backbone.forward_views([one])
        torch.testing.assert_close(alone.cls[0], seen.cls[i], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            alone.patches, seen.patches.view(3, 5, -1)[i, order], atol=2e-5, rtol=1e-4
        )
    # Pixels of a patch that is not visible change nothing.
    hidden = next(n for n in range(16) if n not in visible[0])
    changed = image.clone()
    row, column = hidden // 4 * 8, hidden % 4 * 8
    changed[0, :, row : row + 8, column : column + 8] += 5
    (again,) = backbone.forward_views([View(changed, None, None, given, view.patches, visible)])
    torch.testing.assert_close(again.cls, seen.cls)
    # All patches visible: as without the argument.
    every = torch.arange(16).expand(3, -1)
    wanted = torch.arange(48)
    (whole,) = backbone.forward_views([View(image, None, None, given, wanted)])
    (same,) = backbone.forward_views([View(image, None, None, given, wanted, every)])
    torch.testing.assert_close(same.cls, whole.cls)
    torch.testing.assert_close(same.patches, whole.patches)
