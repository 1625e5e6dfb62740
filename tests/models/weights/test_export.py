"""Exports give the same tokens when loaded by geofm, timm, DINOv2 and TorchGeo."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import interpolate

from geofm.models import (
    CheckpointError,
    MultiSensorViT,
    create_backbone,
    export_backbone,
    load_backbone,
    load_backbone_weights,
    read_hparams,
)
from geofm.models.timm_vit import load_model
from geofm.models.weights.export import Format
from tests.models.weights.vits import SMALL, randomise

#: Out of the canonical order, and not all of them.
BANDS = ['B08', 'VV', 'B02', 'VH', 'B11']


def checkpoint(folder: Path, name: str, bands: list[str] | None = None, **args: Any) -> Path:
    """Write a checkpoint in the layout of `geofm fit`."""
    model_args = {**SMALL, 'img_size': 64, **args}
    hparams = {
        'model': name,
        'in_channels': len(bands) if bands else 15,
        'bands': bands,
        'model_args': model_args,
        'lr': 4e-3,
        'mask_ratio': (0.1, 0.5),
    }
    backbone = create_backbone(hparams)
    randomise(backbone)
    state = {f'model.{k}': v for k, v in backbone.state_dict().items()}
    state |= {f'student.backbone.{k}': torch.zeros_like(v) for k, v in state.items()}
    path = folder / 'last.ckpt'
    torch.save({'state_dict': state, 'hyper_parameters': hparams, 'epoch': 3}, path)
    return path


@pytest.fixture(params=['linear', 'xattn', 'early'])
def fused(request: Any, tmp_path: Path) -> Path:
    return checkpoint(tmp_path, f'geofm_vit_tiny_patch16_{request.param}', BANDS)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize('name', ['a.safetensors', 'new/a.pth', 'a.ckpt'])
def test_geofms_own_format_is_the_whole_backbone(name: str, fused: Path, tmp_path: Path) -> None:
    output, left_out = export_backbone(fused, tmp_path / name)
    assert (output, left_out) == (tmp_path / name, ())
    assert output.stat().st_size < fused.stat().st_size
    assert not list(output.parent.glob('.*'))
    for load in (load_backbone, load_model):
        loaded = load(output)
        assert isinstance(loaded, MultiSensorViT)
        assert not loaded.training
        assert loaded.bands == tuple(BANDS)
        assert_equal(loaded, load_backbone(fused))
    hparams = read_hparams(output)
    assert json.dumps(hparams) == json.dumps(read_hparams(fused))
    # Again, out of the export; and as weights to start from.
    again = export_backbone(output, tmp_path / 'b.safetensors').path
    fresh = create_backbone(hparams)
    load_backbone_weights(fresh, again)
    assert_equal(fresh, load_backbone(fused))


@pytest.mark.parametrize('to', ['timm', 'dinov2'])
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize('ffn_layer', ['mlp', 'swiglu'])
def test_one_sensors_vit_in_a_plain_timm_model(
    to: Format, suffix: str, ffn_layer: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, 'geofm_vit_tiny_patch16_linear', BANDS, ffn_layer=ffn_layer)
    output, left_out = export_backbone(path, tmp_path / f'vit{suffix}', to, 's2')
    assert left_out == (
        'encoders.s1',
        'day_of_year',
        'fusion',
        *(['mask_token'] if to == 'timm' else []),
        'stand_in',
    )
    gated: dict[str, Any] = {
        'mlp_layer': SwiGLUPacked,
        'act_layer': nn.SiLU,
        'mlp_ratio': 176.5 / 32,
    }
    vit = VisionTransformer(
        img_size=64,
        in_chans=3,
        num_classes=0,
        init_values=1.0,
        reg_tokens=4,
        no_embed_class=True,
        **SMALL,
        **(gated if ffn_layer == 'swiglu' else {}),
    )
    safe = suffix == '.safetensors'
    state = load_file(output) if safe else torch.load(output, weights_only=True)
    if safe:
        with safe_open(output, framework='pt') as file:
            said = json.loads(file.metadata()['geofm'])
        assert said == {'sensor': 's2', 'bands': ['B02', 'B08', 'B11']}
    assert ('blocks.0.mlp.w12.weight' in state) == (to == 'dinov2' and ffn_layer == 'swiglu')
    vit.load_state_dict(checkpoint_filter_fn(dict(state), vit) if to == 'dinov2' else state)
    backbone = load_backbone(path)
    encoder = backbone.get_submodule('encoders.s2')
    assert_equal(vit, encoder)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(vit.eval().forward_features(x), encoder.forward_features(x))  # type: ignore[operator]

    # And back: every tensor of the encoder, to the bit.
    fresh = create_backbone(read_hparams(path))
    source = {'path': str(output)} | ({} if safe else {'bands': ['B02', 'B08', 'B11']})
    with pytest.warns(UserWarning, match='initial values|no mask_token'):
        load_backbone_weights(fresh, {'s2': source})  # type: ignore[dict-item]
    assert_equal(fresh.get_submodule('encoders.s2'), encoder)
    if to == 'dinov2':
        assert torch.equal(fresh.mask_token[1], backbone.mask_token[1])


def test_the_one_vit_of_early_fusion(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 'geofm_vit_tiny_patch16_early', BANDS)
    output, left_out = export_backbone(path, tmp_path / 'vit.safetensors', 'dinov2')
    assert left_out == ('day_of_year',)
    with safe_open(output, framework='pt') as file:
        said = json.loads(file.metadata()['geofm'])
    assert said == {'sensor': 'vit', 'bands': ['VV', 'VH', 'B02', 'B08', 'B11']}
    fresh = create_backbone(read_hparams(path))
    load_backbone_weights(fresh, output)
    backbone = load_backbone(path)
    assert_equal(fresh.encoders, backbone.encoders)
    assert torch.equal(fresh.mask_token, backbone.mask_token)
    with pytest.raises(ValueError, match='none for s2 alone: leave --sensor out'):
        export_backbone(path, tmp_path / 'vit.pth', 'timm', 's2')
    other = create_backbone({**read_hparams(path), 'model': 'geofm_vit_tiny_patch16_linear'})
    with pytest.raises(CheckpointError, match=r"its model has encoders for \['vit'\]"):
        load_backbone_weights(other, {'s2': str(path)})
    with pytest.raises(ValueError, match=r"weights for \['s2'\], but the model has \['vit'\]"):
        load_backbone_weights(fresh, {'s2': str(output)})


def test_dinov2s_layout_is_its_authors(tmp_path: Path) -> None:
    """Names and shapes of `dinov2_vits14_reg4_pretrain.pth` as published by its authors."""
    path = checkpoint(tmp_path, 'geofm_vit_tiny_patch14_s2', ['B04', 'B03', 'B02'], img_size=70)
    output = export_backbone(path, tmp_path / 'a.pth', 'dinov2').path
    shapes = {k: tuple(v.shape) for k, v in torch.load(output, weights_only=True).items()}
    width, hidden = 32, 128
    block = {
        'norm1.weight': (width,),
        'norm1.bias': (width,),
        'attn.qkv.weight': (3 * width, width),
        'attn.qkv.bias': (3 * width,),
        'attn.proj.weight': (width, width),
        'attn.proj.bias': (width,),
        'ls1.gamma': (width,),
        'norm2.weight': (width,),
        'norm2.bias': (width,),
        'mlp.fc1.weight': (hidden, width),
        'mlp.fc1.bias': (hidden,),
        'mlp.fc2.weight': (width, hidden),
        'mlp.fc2.bias': (width,),
        'ls2.gamma': (width,),
    }
    assert shapes == {
        'cls_token': (1, 1, width),
        'pos_embed': (1, 26, width),
        'register_tokens': (1, 4, width),
        'mask_token': (1, width),
        'patch_embed.proj.weight': (width, 3, 14, 14),
        'patch_embed.proj.bias': (width,),
        'norm.weight': (width,),
        'norm.bias': (width,),
        **{f'blocks.{i}.{name}': shape for i in range(3) for name, shape in block.items()},
    }


def test_a_named_timm_model_takes_it_strictly(tmp_path: Path) -> None:
    small = {'embed_dim': 384, 'depth': 12, 'num_heads': 6}
    path = checkpoint(tmp_path, 'geofm_vit_small_patch14_s1', ['VV', 'VH'], **small)
    # 64 px hold 4 x 4 patches of 14 px.
    output = export_backbone(path, tmp_path / 'a.pth', 'timm').path
    vit = timm.create_model('vit_small_patch14_reg4_dinov2', in_chans=2, img_size=56, num_classes=0)
    vit.load_state_dict(torch.load(output, weights_only=True))
    assert_equal(vit, load_backbone(path).get_submodule('encoders.s1'))


def test_what_cannot_be_written_is_said(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'a\.h5: the suffix must be \.safetensors'):
        export_backbone(fused, tmp_path / 'a.h5')
    if 'early' not in read_hparams(fused)['model']:
        with pytest.raises(ValueError, match=r'last\.ckpt: set the sensor of the ViT'):
            export_backbone(fused, tmp_path / 'a.pth', 'timm')
    with pytest.raises(ValueError, match='for the whole backbone: leave sensor out'):
        export_backbone(fused, tmp_path / 'a.pth', 'geofm', 's1')
    with pytest.raises(ValueError, match=r'a\.safetensors: TorchGeo reads PyTorch files only'):
        export_backbone(fused, tmp_path / 'a.safetensors', 'torchgeo')
    with pytest.raises(CheckpointError, match=r'gone\.ckpt: no such file'):
        export_backbone(tmp_path / 'gone.ckpt', tmp_path / 'a.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['last.ckpt']


def _dinov2_positions(stored: Tensor, size: int, antialias: bool, offset: float) -> Tensor:
    """Interpolate positions as ``DinoVisionTransformer.interpolate_pos_encoding`` does."""
    side = math.isqrt(stored.shape[1] - 1)
    scale: dict[str, Any] = {'size': (size, size)}
    if offset:
        scale = {'scale_factor': ((size + offset) / side,) * 2}
    grid = stored[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = interpolate(grid, mode='bicubic', antialias=antialias, **scale)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize('size', [3, 4, 7])
def test_dinov2_must_be_told_how_positions_are_interpolated(size: int, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 'geofm_vit_tiny_patch16_s2', ['B04'], reg_tokens=0)
    exported = export_backbone(path, tmp_path / 'vit.pth', 'dinov2').path
    stored = torch.load(exported, weights_only=True)['pos_embed']
    encoder: Any = load_backbone(path).encoders['s2']
    with torch.no_grad():
        nothing = torch.zeros(1, size, size, stored.shape[-1])
        ours = encoder._pos_embed(nothing)[:, 1:]
        told = _dinov2_positions(stored, size, antialias=True, offset=0.0)
        default = _dinov2_positions(stored, size, antialias=False, offset=0.1)
    torch.testing.assert_close(ours, told, atol=1e-6, rtol=1e-5)
    if size != 4:
        assert (ours - default).abs().max() > 0.02
    docs = (Path(__file__).parents[3] / 'docs' / 'models.md').read_text()
    for text in (docs, export_backbone.__doc__ or ''):
        assert 'interpolate_antialias=True' in text
        assert 'interpolate_offset=0.0' in text
