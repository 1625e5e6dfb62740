import itertools
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geofm.models import MODEL_NAMES, MultiSensorViT
from geofm.models.dates import NO_DATE
from geofm.models.registry import PATCH_SIZES, SIZES, VARIANTS
from geofm.models.shapes import shapes_only
from geofm.models.tokens import View
from geofm.sensors import BANDS, SENSORS, BandError

SMALL: dict[str, Any] = {'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'patch_size': 8}
#: LayerScale of 1: at its initial 1e-5 a block changes almost nothing and a test could not fail.
OPEN: dict[str, Any] = {**SMALL, 'init_values': 1.0}


def build(**kwargs: Any) -> MultiSensorViT:
    return MultiSensorViT(**{**OPEN, **kwargs}).eval()


@pytest.mark.parametrize('fusion', ['linear', 'xattn', 'early'])
def test_shapes(fusion: str) -> None:
    model = build(fusion=fusion, num_classes=7)
    x = torch.randn(2, 15, 32, 48)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape == (2, 1 + 4 + 4 * 6, 32)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 32)


@pytest.mark.parametrize(('height', 'width'), [(112, 112), (56, 84), (28, 28)])
def test_one_sensor_gives_the_tokens_of_the_timm_model(height: int, width: int) -> None:
    layout: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'patch_size': 14}
    reference = timm.create_model(
        'vit_small_patch14_reg4_dinov2', in_chans=13, num_classes=0, dynamic_img_size=True, **layout
    ).eval()
    assert isinstance(reference, VisionTransformer)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = build(sensors=('s2',), in_chans=13, img_size=518, **layout)
    model.encoders['s2'].load_state_dict(reference.state_dict())
    x = torch.randn(2, 13, height, width)
    torch.testing.assert_close(
        model.forward_features(x), reference.forward_features(x), atol=1e-5, rtol=1e-5
    )


def test_linear_fusion_is_that_of_the_formula() -> None:
    model = build()
    x = torch.randn(2, 15, 32, 32)
    s1 = model.encoders['s1'].forward_features(x[:, :2])  # type: ignore[operator]
    s2 = model.encoders['s2'].forward_features(x[:, 2:])  # type: ignore[operator]
    first, norm, act, last = model.fusion.mlp  # type: ignore[union-attr]
    assert isinstance(act, nn.GELU)
    assert (first.in_features, first.out_features, last.out_features) == (64, 128, 32)
    expected = last(nn.functional.gelu(norm(first(torch.cat([s1, s2], dim=-1)))))
    torch.testing.assert_close(model.forward_features(x), expected)


def plain_attention(attn: nn.MultiheadAttention, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-head attention head by head, as in the textbook."""
    width = q.shape[-1]
    wq, wk, wv = attn.in_proj_weight.split(width)
    bq, bk, bv = attn.in_proj_bias.split(width)
    q, k, v = q @ wq.T + bq, kv @ wk.T + bk, kv @ wv.T + bv
    size = width // attn.num_heads
    outputs, weights = [], []
    for head in range(attn.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        weights.append(scores.softmax(dim=-1))
        outputs.append(weights[-1] @ v[..., part])
    return attn.out_proj(torch.cat(outputs, dim=-1)), torch.stack(weights, dim=1)


@pytest.mark.parametrize('query', ['s1', 's2'])
@pytest.mark.parametrize('shared', [True, False])
def test_cross_attention_is_that_of_the_formula(query: str, shared: bool) -> None:
    model = build(fusion='xattn', query=query, nlayer=3, shared=shared)
    x = torch.randn(2, 15, 32, 32)
    tokens = {
        's1': model.encoders['s1'].forward_features(x[:, :2]),  # type: ignore[operator]
        's2': model.encoders['s2'].forward_features(x[:, 2:]),  # type: ignore[operator]
    }
    out = tokens.pop(query)
    (context,) = tokens.values()
    blocks: list[Any] = list(model.fusion.blocks)  # type: ignore[union-attr]
    assert len(blocks) == (1 if shared else 3)
    for i in range(3):
        block = blocks[0] if shared else blocks[i]
        attended, weights = plain_attention(block.attn, out, context)
        out = block.norm1(out + attended)
        out = block.norm2(out + block.mlp(out))
    torch.testing.assert_close(model.forward_features(x), out, atol=1e-5, rtol=1e-4)
    shown = model.cls_attention(x)['fusion']
    expected = weights[:, :, 0, model.num_prefix_tokens :].unflatten(-1, (4, 4))
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('block', [0, 1, -1])
def test_cls_attention_is_softmax_of_the_scaled_product(block: int) -> None:
    model = build()
    x = torch.randn(2, 15, 32, 32)
    seen: dict[str, Tensor] = {}
    for key in ('s1', 's2'):
        attn: Any = model.encoders[key].blocks[block].attn  # type: ignore[union-attr, index]
        # Unfused attention passes its weights through this dropout.
        attn.fused_attn = False
        attn.attn_drop.register_forward_hook(
            lambda module, args, output, key=key: seen.__setitem__(key, args[0])
        )
    model.forward_features(x)
    maps = model.cls_attention(x, block=block)
    assert set(maps) == {'s1', 's2'}
    for key, weights in seen.items():
        expected = weights[:, :, 0, model.num_prefix_tokens :].unflatten(-1, (4, 4))
        torch.testing.assert_close(maps[key], expected, atol=1e-5, rtol=1e-5)
        assert (maps[key].sum(dim=(-1, -2)) < 1).all()


def test_bands_are_matched_by_name() -> None:
    model = build()
    order = torch.randperm(15).tolist()
    shuffled = build(bands=[BANDS[i] for i in order])
    shuffled.load_state_dict(model.state_dict())
    x = torch.randn(2, 15, 32, 32)
    torch.testing.assert_close(shuffled(x[:, order]), model(x))


@pytest.mark.parametrize('fusion', ['linear', 'xattn'])
@pytest.mark.parametrize('key', ['s1', 's2'])
def test_a_model_for_one_sensor_sees_what_the_fused_one_sees_without_the_other(
    fusion: str, key: str
) -> None:
    model = build(fusion=fusion)
    alone = build(fusion=fusion, in_chans=len(SENSORS[key].bands))
    alone.load_state_dict(model.state_dict())
    assert alone.bands == SENSORS[key].band_names
    x = torch.randn(2, 15, 32, 32)
    channels = [BANDS.index(band) for band in alone.bands]
    present = torch.tensor([[key == 's1', key == 's2']]).expand(2, -1)
    hidden = model.forward_features(x, present=present)
    torch.testing.assert_close(alone.forward_features(x[:, channels]), hidden)
    assert set(alone.cls_attention(x[:, channels])) == {key, *(['fusion'] * (fusion == 'xattn'))}
    # Patches of an absent query sensor keep their places, so their tokens differ.
    patches = hidden[0, model.num_prefix_tokens :]
    assert (patches - patches[0]).norm(dim=1)[1:].min() > 1e-3


def test_presence_is_per_sample() -> None:
    model = build()
    x = torch.randn(2, 15, 32, 32)
    mixed = model.forward_features(x, present=torch.tensor([[True, True], [False, True]]))
    torch.testing.assert_close(mixed[0], model.forward_features(x)[0])
    assert not torch.allclose(mixed[1], model.forward_features(x)[1])


def test_hidden_patches_do_not_show() -> None:
    model = build()
    nn.init.normal_(model.mask_token)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 5] = True  # row 1, column 1
    x = torch.randn(1, 15, 32, 32)
    changed = x.clone()
    changed[..., 8:16, 8:16] = 9
    torch.testing.assert_close(
        model.forward_features(x, masks=masks), model.forward_features(changed, masks=masks)
    )
    assert not torch.allclose(model.forward_features(x), model.forward_features(changed))


def test_dates_of_each_sensor_matter_unless_unknown() -> None:
    model = build()
    x = torch.randn(1, 15, 32, 32)
    known, unknown = 17_600, NO_DATE
    plain = model(x)
    torch.testing.assert_close(model(x, torch.tensor([[unknown, unknown]])), plain)
    outputs = [model(x, torch.tensor([dates])) for dates in ([known, unknown], [unknown, known])]
    for a, b in itertools.combinations([plain, *outputs], 2):
        assert not torch.allclose(a, b)


def test_intermediates_end_in_the_features() -> None:
    model = build(fusion='xattn')
    x = torch.randn(2, 15, 32, 48)
    final, features = model.forward_intermediates(x, [0, 2], return_prefix_tokens=True)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [patches.shape for patches, _ in features] == [(2, 32, 4, 6)] * 2
    patches, prefix = features[-1]
    torch.testing.assert_close(torch.cat([prefix, patches.flatten(2).mT], dim=1), final)
    only = model.forward_intermediates(x, 1, output_fmt='NLC', intermediates_only=True)
    torch.testing.assert_close(only[0], final[:, model.num_prefix_tokens :])
    early = model.forward_intermediates(x, [0], intermediates_only=True)
    torch.testing.assert_close(early[0], features[0][0])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    x = torch.randn(2, 15, 16, 16)
    gradients = []
    model = build().train()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'in_chans': 10}, 'the bands of the 10 channels'),
        ({'in_chans': 3, 'bands': ['VV', 'VH']}, 'in_chans=3, but 2 bands'),
        ({'in_chans': 1, 'bands': ['B99']}, 'unknown bands'),
        ({'in_chans': 2, 'bands': ['VV', 'VV']}, 'given twice'),
        ({'in_chans': 2, 'bands': ['VV', 'B02'], 'sensors': ('s2',)}, r"bands of \['s1'\]"),
    ],
)
def test_bands_that_do_not_fit_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(BandError, match=message):
        build(**kwargs)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'fusion': 'sum'}, 'fusion must be'),
        ({'fusion': 'xattn', 'query': 's3'}, 'query must be'),
        ({'fusion': 'xattn', 'nhead': 5}, 'not a multiple'),
        ({'sensors': ()}, 'sensors must be'),
        ({'sensors': ('s1', 'aster')}, 'sensors must be'),
        ({'global_pool': 'max'}, 'global_pool must be'),
    ],
)
def test_arguments_that_mean_nothing_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_all_models_are_known_to_timm_by_name() -> None:
    assert set(timm.list_models('geofm_*')) == set(MODEL_NAMES)
    assert len(MODEL_NAMES) == len(SIZES) * len(PATCH_SIZES) * len(VARIANTS)
    # Every size, and every patch size and variant of the smallest: large models take seconds each.
    names = [f'geofm_vit_{size}_patch16_linear' for size in SIZES]
    names += [f'geofm_vit_nano_patch{p}_{v}' for p in PATCH_SIZES for v in VARIANTS]
    with shapes_only():
        for name in names:
            assert name in MODEL_NAMES
            model = timm.create_model(name)
            assert isinstance(model, MultiSensorViT)
            assert model.num_classes == 0
            assert next(iter(model.state_dict())) == 'mask_token'
            assert isinstance(model.head, nn.Identity)


def test_timm_arguments_reach_the_model() -> None:
    model = timm.create_model(
        'geofm_vit_tiny_patch16_linear', in_chans=15, num_classes=10, drop_path_rate=0.2, depth=2
    )
    assert isinstance(model, MultiSensorViT)
    assert model(torch.randn(1, 15, 32, 32)).shape == (1, 10)
    last: Any = model.encoders['s1'].blocks[-1]  # type: ignore[index]
    assert last.drop_path1.drop_prob == pytest.approx(0.2)
    pyramid = timm.create_model(
        'geofm_vit_tiny_patch16_linear', features_only=True, depth=4, out_indices=(1, 3)
    )
    assert [f.shape for f in pyramid(torch.randn(1, 15, 32, 32))] == [(1, 192, 2, 2)] * 2


def test_mean_pooling_leaves_prefix_tokens_out() -> None:
    model = build(global_pool='avg')
    x = torch.randn(1, 15, 32, 32)
    expected = model.forward_features(x)[:, model.num_prefix_tokens :].mean(dim=1)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('fusion', ['linear', 'xattn', 'early'])
@pytest.mark.parametrize('given', [1, 13, 16, 20])
def test_another_number_of_channels_is_refused_by_every_way_in(fusion: str, given: int) -> None:
    model = build(fusion=fusion)
    x = torch.randn(2, given, 16, 16)
    ways: list[Any] = [
        model,
        model.forward_features,
        model.forward_intermediates,
        model.observe,
        lambda x: model.forward_views([View(torch.randn(2, 15, 16, 16)), View(x)]),
    ]
    for way in ways:
        with pytest.raises(BandError, match=rf'has {given} channels, but 15 bands .*VV'):
            way(x)


def test_a_model_of_three_bands_does_not_take_the_first_three_of_thirteen() -> None:
    model = build(sensors=('s2',), in_chans=3)
    with pytest.raises(BandError, match=r"13 channels, but 3 bands are expected: \['B04', 'B03'"):
        model(torch.randn(1, 13, 16, 16))
