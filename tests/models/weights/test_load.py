"""Encoders with weights of other projects compute what the original models compute."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from geofm.models import CheckpointError, MultiSensorViT, load_backbone_weights
from geofm.models.weights.load import Weights
from geofm.sensors import SENSORS, BandError
from tests.models.weights.vits import (
    SMALL,
    chunked,
    dinov2_state,
    load_dinov2,
    randomise,
    timm_vit,
)

RGB = ['B04', 'B03', 'B02']
S2 = list(SENSORS['s2'].band_names)

#: In the order of our encoders.
BGR = RGB[::-1]


def ours(name: str = 'geofm_vit_tiny_patch16_s2', **kwargs: Any) -> MultiSensorViT:
    """Build a small geofm model, by default with three S2 bands."""
    if name == 'geofm_vit_tiny_patch16_s2':
        kwargs = {'bands': BGR, 'in_chans': 3, **SMALL, 'img_size': 64, **kwargs}
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    assert isinstance(model, MultiSensorViT)
    return model


def small_timm(**kwargs: Any) -> timm.models.VisionTransformer:
    kwargs = {**SMALL, 'init_values': 1e-5, 'img_size': 64, **kwargs}
    return timm_vit('vit_tiny_patch16_224', **kwargs)


def load(model: MultiSensorViT, weights: Weights) -> str:
    """Load weights, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        load_backbone_weights(model, weights)
    return '\n'.join(str(w.message) for w in caught if w.category is UserWarning)


def same_tokens(tokens: Tensor, expected: Tensor) -> None:
    """Compare up to rounding: timm embeds patches by convolution, geofm by a matrix product."""
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def save(state: Any, path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
    return str(path)


def named(path: str | Path, bands: list[str] = BGR) -> Weights:
    return {'s2': {'path': str(path), 'bands': bands}}


def images(size: int, bands: int = 3) -> Tensor:
    return torch.randn(2, bands, size, size)


@pytest.mark.parametrize('layout', ['timm', 'dinov2', 'teacher'])
def test_tokens_of_dinov2_are_timms(layout: str, tmp_path: Path) -> None:
    name = 'vit_small_patch14_reg4_dinov2'
    reference = timm_vit(name, depth=4)
    state: Any = reference.state_dict()
    if layout != 'timm':
        state = dinov2_state(reference, registers=4)
        load_dinov2(reference, state)
    if layout == 'teacher':
        state = {f'backbone.{k}': v for k, v in chunked(state, 2, 4).items()}
        state = {'teacher': {**state, 'dino_head.mlp.0.weight': torch.randn(3, 3)}}
    path = save(state, tmp_path / f'{name}.pth')
    model = ours('geofm_vit_small_patch14_s2', in_chans=3, bands=RGB, img_size=518, depth=4)
    load(model, path)
    for size in (518, 224, 98):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(
                model.forward_features(x), reference.forward_features(x), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_position_of_cls_goes_into_the_token(suffix: str, tmp_path: Path) -> None:
    """Load a timm ViT with positions of CLS, and compare the tokens."""
    reference = small_timm()
    assert reference.get_parameter('pos_embed').shape[1] == 17
    path = tmp_path / f'vit{suffix}'
    if suffix == '.safetensors':
        save_file(reference.state_dict(), path)
    else:
        save(reference.state_dict(), path)
    model = ours(reg_tokens=0)
    assert load(model, named(path)) == f'{path} into the encoder of s2: no mask_token in the source'
    for size in (64, 48, 96):
        x = images(size)
        same_tokens(model.forward_features(x), reference.forward_features(x))


def test_positions_of_registers_go_into_the_tokens(tmp_path: Path) -> None:
    reference = small_timm(reg_tokens=2)
    assert reference.get_parameter('pos_embed').shape[1] == 19
    model = ours(reg_tokens=2)
    load(model, named(save(reference.state_dict(), tmp_path / 'vit.pth')))
    x = images(64)
    same_tokens(model.forward_features(x), reference.forward_features(x))


def test_a_vit_without_layer_scale_keeps_what_it_computes(tmp_path: Path) -> None:
    reference = small_timm(init_values=None)
    model = ours(reg_tokens=0)
    said = load(model, named(save(reference.state_dict(), tmp_path / 'vit.pth')))
    assert 'no LayerScale in the source: scales are 1' in said
    x = images(64)
    same_tokens(model.forward_features(x), reference.forward_features(x))
    scaled = small_timm()
    with pytest.raises(CheckpointError, match=r'scaled\.pth: its ViT has LayerScale'):
        load(ours(init_values=0), save(scaled.state_dict(), tmp_path / 'scaled.pth'))


def test_swiglu_of_dinov2(tmp_path: Path) -> None:
    model = ours(ffn_layer='swiglu', reg_tokens=4)
    reference = model.get_submodule('encoders.s2')
    assert isinstance(reference, timm.models.VisionTransformer)
    state = dinov2_state(reference, registers=4, swiglu=True)
    assert 'blocks.0.mlp.w12.weight' in state
    fresh = ours(ffn_layer='swiglu')
    load(fresh, named(save(state, tmp_path / 'g.pth')))
    load_dinov2(reference, state)
    x = images(64)
    assert torch.equal(fresh.forward_features(x), model.forward_features(x))
    with pytest.raises(CheckpointError, match=r'SwiGLU of 88.*MLP of 128.*ffn_layer'):
        load(ours(), str(tmp_path / 'g.pth'))


def test_the_mask_token_comes_along(tmp_path: Path) -> None:
    state = dinov2_state(small_timm(), registers=0)
    model = ours(reg_tokens=0)
    load(model, save(state, tmp_path / 'a.pth'))
    assert torch.equal(model.mask_token, state['mask_token'])


def test_bands_are_matched_by_name(tmp_path: Path) -> None:
    reference = small_timm(in_chans=4)
    path = save(reference.state_dict(), tmp_path / 'four.pth')
    kernels = reference.patch_embed.proj.weight
    model = ours(in_chans=4, bands=['B08', 'B02', 'B11', 'B04'], reg_tokens=0)
    said = load(model, named(path, ['B04', 'B8A', 'B08', 'B02']))
    assert 'B11 start from the mean of the kernels' in said
    assert 'kernels of B8A not used' in said
    # The encoder has its bands in canonical order: B02, B04, B08, B11.
    loaded = model.get_parameter('encoders.s2.patch_embed.proj.weight')
    for i, kernel in enumerate((kernels[:, 3], kernels[:, 0], kernels[:, 2], kernels.mean(dim=1))):
        assert torch.equal(loaded[:, i], kernel)
    # Whatever the order of the model's input, it computes what the source does.
    same = ours(in_chans=4, bands=['B02', 'B04', 'B08', 'B8A'], reg_tokens=0)
    load(same, named(path, ['B04', 'B8A', 'B08', 'B02']))
    x = images(64, 4)
    torch.testing.assert_close(
        same.forward_features(x[:, [3, 0, 2, 1]]), reference.forward_features(x)
    )


def test_bands_without_a_name_are_asked_for(tmp_path: Path) -> None:
    path = save(small_timm(in_chans=4).state_dict(), tmp_path / 'four.pth')
    with pytest.raises(BandError, match=r'four\.pth: the bands of its 4 channels are unknown'):
        load(ours(), path)
    with pytest.raises(BandError, match=r'four\.pth: 3 bands are given for its 4 channels'):
        load(ours(), named(path, RGB))
    with pytest.raises(BandError, match=r"four\.pth: unknown bands \['red'\]"):
        load(ours(), named(path, ['red', 'B03', 'B02', 'B08']))


def test_what_is_not_loaded_is_listed(tmp_path: Path) -> None:
    reference = small_timm(num_classes=7, patch_size=14, img_size=98)
    path = save(reference.state_dict(), tmp_path / 'vit.pth')
    said = load(ours(), path)
    assert re.search(r'vit\.pth into the encoder of s2', said)
    assert 'its channels are assumed to be B04, B03, B02' in said
    assert 'patches resampled from 14 x 14 to 16 x 16 px' in said
    assert 'positions resampled from 7 x 7 to 4 x 4' in said
    assert 'not in the source: reg_token' in said
    assert 'not used: head.bias, head.weight' in said
    # Nothing but what says itself: an exact fit says nothing at all.
    other = small_timm()
    exact = {**other.state_dict(), 'mask_token': torch.randn(1, 32)}
    assert load(ours(reg_tokens=0), named(save(exact, tmp_path / 'exact.pth'))) == ''


def test_patches_of_another_size_see_the_same(tmp_path: Path) -> None:
    """FlexiViT's resampling: an enlarged patch has the embedding of the original patch."""
    reference = small_timm(patch_size=8, img_size=32)
    model = ours(reg_tokens=0)
    load(model, named(save(reference.state_dict(), tmp_path / 'vit.pth')))
    patch = images(8)
    large = torch.nn.functional.interpolate(patch, (16, 16), mode='bicubic', antialias=True)
    ours_, theirs = model.get_submodule('encoders.s2.patch_embed'), reference.patch_embed
    torch.testing.assert_close(ours_(large), theirs(patch), atol=1e-5, rtol=1e-4)


def test_registers_of_another_number_start_anew(tmp_path: Path) -> None:
    path = save(small_timm(reg_tokens=4).state_dict(), tmp_path / 'vit.pth')
    model = ours(reg_tokens=2)
    before = model.get_parameter('encoders.s2.reg_token').clone()
    said = load(model, path)
    assert 'registers not used: 4 instead of 2' in said
    assert 'not in the source: reg_token' in said
    assert torch.equal(model.get_parameter('encoders.s2.reg_token'), before)


@pytest.mark.parametrize('wrong', [{'embed_dim': 48}, {'depth': 2}, {'mlp_ratio': 2}])
def test_another_build_is_one_clear_error(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = save(small_timm(**wrong).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError) as error:
        load(ours(), path)
    text = str(error.value)
    assert text.startswith(path)
    assert 'width 32, depth 3, MLP of 128' in text
    assert len(text.splitlines()) == 1


def test_one_source_a_sensor(tmp_path: Path) -> None:
    s1, s2 = small_timm(in_chans=2), small_timm(in_chans=13)
    files = {
        's1': save(s1.state_dict(), tmp_path / 's1.pth'),
        's2': save(s2.state_dict(), tmp_path / 's2.pth'),
    }
    model = ours('geofm_vit_tiny_patch16_linear', **SMALL, img_size=64, reg_tokens=0)
    fusion = {k: v.clone() for k, v in model.state_dict().items() if k.startswith('fusion')}
    said = load(model, files)
    assert 'its channels are assumed to be VV, VH' in said
    assert 'no weights were given for the fusion: initial values' in said
    x = images(64, 15)
    for key, reference, channels in (('s1', s1, slice(2)), ('s2', s2, slice(2, None))):
        encoder = model.get_submodule(f'encoders.{key}')
        expected = reference.forward_features(x[:, channels])
        assert torch.equal(encoder.forward_features(x[:, channels]), expected)  # type: ignore[operator]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in fusion.items())

    half = ours('geofm_vit_tiny_patch16_linear', **SMALL, img_size=64, reg_tokens=0)
    before = half.get_parameter('encoders.s1.patch_embed.proj.weight').clone()
    assert 'no weights were given for the encoder of s1 and the fusion' in load(
        half, {'s2': files['s2']}
    )
    assert torch.equal(half.get_parameter('encoders.s1.patch_embed.proj.weight'), before)

    with pytest.raises(CheckpointError, match=r's1\.pth: not a checkpoint of geofm.*\{s1:'):
        load(model, files['s1'])
    with pytest.raises(CheckpointError, match=r'gone\.pth: no such file'):
        load(model, tmp_path / 'gone.pth')
    with pytest.raises(ValueError, match=r"weights for \['s3'\], but the model has"):
        load(model, {'s3': files['s1']})
    with pytest.raises(ValueError, match=r"weights of s1 must be \{path: FILE.*not \{'file'"):
        load(model, {'s1': {'file': files['s1']}})  # type: ignore[dict-item]


def test_torchgeos_weights_by_file_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in the layout of `ViTSmall16_Weights.SENTINEL2_ALL_DINO`, as a file and by name."""
    reference = timm_vit('vit_small_patch16_224', in_chans=13)
    state = reference.state_dict()
    model = ours('geofm_vit_small_patch16_s2', in_chans=13, reg_tokens=0)
    said = load(model, save(state, tmp_path / 'vits16_s2_dino.pth'))
    assert f'its channels are assumed to be {", ".join(S2)}' in said
    x = torch.randn(1, 13, 96, 96)
    with torch.no_grad():
        expected = reference.forward_features(x)
        same_tokens(model.forward_features(x), expected)

    asked = []

    def download(url: str, **kwargs: Any) -> Any:
        asked.append(url)
        return state

    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', download)
    turned = ours('geofm_vit_small_patch16_s2', in_chans=13, bands=S2[::-1], reg_tokens=0)
    said = load(turned, 'ViTSmall16_Weights.SENTINEL2_ALL_DINO')
    assert 'vit_small_patch16_224_sentinel2_all_dino' in asked[0]
    assert 'assumed to be' not in said
    with torch.no_grad():
        torch.testing.assert_close(turned.forward_features(x.flip(1)), expected)
    with pytest.raises(CheckpointError, match='weights of another sensor'):
        load(turned, 'ViTSmall16_Weights.LANDSAT_TM_TOA_MOCO')
    with pytest.raises(CheckpointError, match='no such file, and no such weights in TorchGeo'):
        load(turned, 'ViTSmall16_Weights.SENTINEL9')


def test_softcons_layout(tmp_path: Path) -> None:
    """SoftCON's Sentinel-1 weights: DINOv2's ViT for 224 px, patches of 14 px, no registers."""
    reference = timm_vit('vit_small_patch14_dinov2', in_chans=2, img_size=224)
    model = ours('geofm_vit_small_patch14_s1', in_chans=2, reg_tokens=0)
    said = load(model, save(reference.state_dict(), tmp_path / 'softcon.pth'))
    assert 'resampled' not in said
    x = torch.randn(1, 2, 98, 98)
    with torch.no_grad():
        same_tokens(model.forward_features(x), reference.forward_features(x))


def test_an_encoder_of_our_own_checkpoint(tmp_path: Path) -> None:
    pretrained = ours()
    randomise(pretrained)
    hparams = {
        'model': 'geofm_vit_tiny_patch16_s2',
        'in_channels': 3,
        'bands': BGR,
        'model_args': {**SMALL, 'img_size': 64},
    }
    state = {f'model.{k}': v for k, v in pretrained.state_dict().items()}
    content = {'state_dict': state, 'hyper_parameters': hparams}
    path = save(content, tmp_path / 'last.ckpt')

    fused = ours('geofm_vit_tiny_patch16_linear', **SMALL, img_size=64)
    said = load(fused, {'s2': path})
    assert 'B01, B05' in said
    assert 'not used: day_of_year' in said
    theirs = pretrained.get_parameter('encoders.s2.patch_embed.proj.weight')
    loaded = fused.get_parameter('encoders.s2.patch_embed.proj.weight')
    # Canonical order: B01, B02, B03, B04, ...
    assert torch.equal(loaded[:, 1:4], theirs)
    assert torch.equal(fused.mask_token[1], pretrained.mask_token[0])

    whole = ours()
    assert load(whole, path) == ''
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in pretrained.state_dict().items())
    with pytest.raises(CheckpointError, match=r"last\.ckpt: its model has encoders \['s2'\]"):
        load(fused, path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: its model has encoders for \['s2'\]"):
        load(fused, {'s1': path})


def test_what_is_no_vit_is_refused(tmp_path: Path) -> None:
    resnet = timm.create_model('resnet10t', num_classes=0)
    with pytest.raises(CheckpointError, match=r'resnet\.pth: no supported ViT'):
        load(ours(), save(resnet.state_dict(), tmp_path / 'resnet.pth'))
    vit = small_timm().state_dict()
    two = {f'{name}.{k}': v for name in ('a', 'b') for k, v in vit.items()}
    with pytest.raises(CheckpointError, match=r"two\.pth: more than one ViT: \['a\.', 'b\.'\]"):
        load(ours(), save(two, tmp_path / 'two.pth'))
    (tmp_path / 'text.safetensors').write_text('not a file of weights')
    with pytest.raises(CheckpointError, match=r'text\.safetensors: not a readable'):
        load(ours(), str(tmp_path / 'text.safetensors'))
    with pytest.raises(CheckpointError, match=r'gone\.pth: no such file'):
        load(ours(), str(tmp_path / 'gone.pth'))
    for shape in ((1, 14, 32), (1, 4, 4, 32)):
        vit['pos_embed'] = torch.randn(shape)
        told = re.escape(f'odd.pth: positions of shape {shape}')
        with pytest.raises(CheckpointError, match=told):
            load(ours(), save(vit, tmp_path / 'odd.pth'))


def test_a_whole_training_state_gives_the_teacher(tmp_path: Path) -> None:
    teacher, student = small_timm(), small_timm()
    state = {
        f'{name}.backbone.{k}': v
        for name, vit in (('student', student), ('teacher', teacher))
        for k, v in vit.state_dict().items()
    }
    model = ours(reg_tokens=0)
    load(model, named(save({'model': state}, tmp_path / 'model.pth')))
    x = images(64)
    same_tokens(model.forward_features(x), teacher.forward_features(x))
