"""Our ViTs as encoders of segmentation-models-pytorch."""

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import encoders, get_encoder

from geofm.models import (
    MODEL_NAMES,
    CheckpointError,
    MultiSensorViT,
    PyramidEncoder,
    register_encoder,
)
from geofm.sensors import BANDS, BandError

TINY: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'init_values': 1.0}


@pytest.fixture(autouse=True, scope='module')
def _small() -> Any:
    """Small models under names of their own."""
    names = {'small', 'small_s2', 'small14', 'rgb', 'shuffled'}
    register_encoder('small', 'geofm_vit_tiny_patch16_linear', **TINY)
    register_encoder('small_s2', 'geofm_vit_tiny_patch16_s2', **TINY)
    register_encoder('small14', 'geofm_vit_tiny_patch16_linear', patch_size=14, **TINY)
    register_encoder('rgb', 'geofm_vit_tiny_patch16_s2', bands=['B04', 'B03', 'B02'], **TINY)
    register_encoder('shuffled', 'geofm_vit_tiny_patch16_linear', bands=BANDS[::-1], **TINY)
    yield
    for name in names:
        del encoders[name]


@pytest.mark.parametrize('name', MODEL_NAMES)
def test_every_model_is_an_encoder_under_its_own_name(name: str) -> None:
    assert encoders[name]['encoder'] is PyramidEncoder
    assert encoders[name]['params'] == {'model': name, 'model_args': {}}


@pytest.mark.parametrize('depth', [1, 2, 3, 4, 5])
def test_depth_says_how_many_maps(depth: int) -> None:
    encoder = get_encoder('small', in_channels=15, depth=depth)
    assert encoder.output_stride == 2**depth
    x = torch.randn(2, 15, 64, 32)
    maps = encoder(x)
    assert torch.equal(maps[0], x)
    assert (
        [m.shape[1] for m in maps]
        == encoder.out_channels
        == [15, 0, 256, 256, 256, 256][: depth + 1]
    )
    assert [tuple(m.shape[2:]) for m in maps] == [(64 >> i, 32 >> i) for i in range(depth + 1)]


@pytest.mark.parametrize('depth', [0, 6])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match='depth must be 1 to 5'):
        get_encoder('small', in_channels=15, depth=depth)


@pytest.mark.parametrize(
    ('name', 'channels', 'bands'),
    [
        ('small', 15, BANDS),
        ('small', 13, BANDS[2:]),
        ('small', 2, BANDS[:2]),
        ('small_s2', 13, BANDS[2:]),
        ('rgb', 3, ('B04', 'B03', 'B02')),
    ],
)
def test_in_channels_say_which_sensors(name: str, channels: int, bands: tuple[str, ...]) -> None:
    encoder = get_encoder(name, in_channels=channels)
    assert encoder.model.bands == bands
    for stride, features in zip(
        (2, 4, 8, 16, 32), encoder(torch.randn(1, channels, 32, 64))[1:], strict=True
    ):
        assert features.shape[2:] == (32 // stride, 64 // stride)
        assert features.isfinite().all()


def test_channels_that_no_bands_can_be_are_refused() -> None:
    with pytest.raises(BandError, match='register_encoder'):
        get_encoder('rgb', in_channels=13)


@pytest.mark.parametrize(('name', 'channels'), [('small', 4), ('small_s2', 15)])
def test_channels_without_a_name_are_refused_when_there_is_an_image(
    name: str, channels: int
) -> None:
    """Until then, weights may name them, and their sensors."""
    encoder = get_encoder(name, in_channels=channels)
    with pytest.raises(BandError, match='the bands of the channels are unknown'):
        encoder(torch.randn(1, channels, 32, 32))


def test_bands_are_matched_by_name() -> None:
    straight, shuffled = (get_encoder(n, in_channels=15).eval() for n in ('small', 'shuffled'))
    shuffled.load_state_dict(straight.state_dict())
    x = torch.randn(2, 15, 32, 32)
    for a, b in zip(straight(x)[1:], shuffled(x.flip(1))[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ('name', 'size', 'step'),
    [('small', (48, 64), 32), ('small', (64, 40), 32), ('small14', (224, 256), 224)],
)
def test_sizes_that_do_not_fit_are_refused(name: str, size: tuple[int, int], step: int) -> None:
    encoder = get_encoder(name, in_channels=15)
    with pytest.raises(ValueError, match=f'{size[0]} x {size[1]} px.* multiples of {step}'):
        encoder(torch.randn(1, 15, *size))


def test_patches_of_14_px() -> None:
    model = smp.UPerNet('small14', encoder_weights=None, in_channels=15, classes=3).eval()
    assert [m.shape[-1] for m in model.encoder(torch.randn(1, 15, 224, 224))] == [
        224,
        112,
        56,
        28,
        14,
        7,
    ]
    assert model(torch.randn(1, 15, 224, 448)).shape == (1, 3, 224, 448)


@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride_is_respected(output_stride: int) -> None:
    encoder = get_encoder('small', in_channels=15, output_stride=output_stride)
    coarsest = encoder(torch.randn(1, 15, 64, 64))[-1]
    assert coarsest.shape[-1] == 64 // output_stride
    with pytest.raises(ValueError, match='output_stride must be 8, 16 or 32'):
        get_encoder('small', in_channels=15, output_stride=4)


@pytest.mark.parametrize('architecture', [smp.Unet, smp.UPerNet, smp.Segformer, smp.DeepLabV3Plus])
def test_gradients_reach_every_tensor(architecture: Any) -> None:
    model = architecture('small', encoder_weights=None, in_channels=15, classes=3)
    logits = model(torch.randn(2, 15, 64, 64))
    assert logits.shape == (2, 3, 64, 64)
    logits.square().mean().backward()
    unused = {n for n, p in model.encoder.named_parameters() if p.grad is None}
    # Without dates and hidden patches; and DeepLabV3+ looks at two maps of five.
    allowed = ('model.day_of_year', 'model.mask_token', 'model.stand_in')
    unused = {n for n in unused if not n.startswith(allowed)}
    if architecture is smp.DeepLabV3Plus:
        unused = {n for n in unused if not n.startswith(('pyramid.levels.1', 'pyramid.levels.2'))}
    assert not unused


def test_segmentation_learns_what_only_the_fine_maps_show() -> None:
    """Bright squares, half a patch wide, within a patch and over the border of two."""
    torch.manual_seed(0)
    model = smp.Segformer('small', encoder_weights=None, in_channels=15, classes=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x = 0.1 * torch.randn(2, 15, 32, 32)
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, 20:28, 4:12] = mask[1, :, 4:12, 12:20] = 1
    x = x + 2 * mask
    for _ in range(80):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model(x) > 0
    union = found | mask.bool()
    assert (found & mask.bool()).sum() / union.sum() > 0.8


# -- weights --------------------------------------------------------------------------------------


def other_weights(model: MultiSensorViT) -> dict[str, torch.Tensor]:
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_weights_of_a_vit_alone_leave_the_pyramid(prefix: str) -> None:
    encoder = get_encoder('small', in_channels=15)
    before = {k: v.clone() for k, v in encoder.pyramid.state_dict().items()}
    weights = other_weights(encoder.model)
    head = {'head.weight': torch.zeros(3, 32), 'head.bias': torch.zeros(3)}
    encoder.load_state_dict({prefix + k: v for k, v in (weights | head).items()})
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    for key, value in encoder.pyramid.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_all_of_an_encoder_is_loaded_as_it_was_saved() -> None:
    first, second = (smp.UPerNet('small', encoder_weights=None, in_channels=15) for _ in range(2))
    second.encoder.load_state_dict(first.encoder.state_dict())
    second.decoder.load_state_dict(first.decoder.state_dict())
    second.segmentation_head.load_state_dict(first.segmentation_head.state_dict())
    x = torch.randn(1, 15, 32, 32)
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize('fault', ['missing', 'more', 'shape'])
def test_weights_that_do_not_fit_are_refused(fault: str) -> None:
    encoder = get_encoder('small', in_channels=15)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    weights = other_weights(encoder.model)
    if fault == 'missing':
        del weights['mask_token']
    elif fault == 'more':
        weights['unknown'] = torch.zeros(1)
    else:
        weights = other_weights(get_encoder('small_s2', in_channels=13).model)
    with pytest.raises(CheckpointError, match="weights do not fit 'geofm_vit_tiny_patch16_linear'"):
        encoder.load_state_dict(weights)
    assert before.keys() == encoder.state_dict().keys()


def test_freezing_the_backbone_leaves_the_pyramid_free() -> None:
    model = smp.Unet('small', encoder_weights=None, in_channels=15)
    model.freeze_encoder()
    free = {n for n, p in model.encoder.named_parameters() if p.requires_grad}
    assert free == {f'pyramid.{n}' for n, _ in model.encoder.pyramid.named_parameters()}
    # What an optimizer is given.
    every = {id(p) for p in model.parameters()}
    assert {id(p) for _, p in model.encoder.named_parameters()} <= every
    model.unfreeze_encoder()
    assert all(p.requires_grad for p in model.parameters())


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['tu-mine', 'resnet50', MODEL_NAMES[0]])
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    kept = encoders.get(name)
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        register_encoder(name, MODEL_NAMES[0])
    assert encoders.get(name) is kept


def test_a_name_of_ours_can_be_given_anew() -> None:
    register_encoder('again', MODEL_NAMES[0], **TINY)
    register_encoder('again', MODEL_NAMES[0], **{**TINY, 'embed_dim': 48})
    assert get_encoder('again', in_channels=15).model.embed_dim == 48
    del encoders['again']


def test_models_of_timm_are_refused() -> None:
    register_encoder('foreign', 'resnet18')
    with pytest.raises(TypeError, match="'resnet18' is not a geofm model"):
        get_encoder('foreign', in_channels=15)
    del encoders['foreign']
