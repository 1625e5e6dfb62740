from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchgeo.tasks import Classification, SemanticSegmentation

from geofm.models import CheckpointError, MultiSensorViT
from geofm.models.timm_vit import TimmViT, has_cls_token, load_model
from geofm.sensors import BandError

RGB = ('B04', 'B03', 'B02')
SMALL: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2}


def build(name: str, **kwargs: Any) -> torch.nn.Module:
    return timm.create_model(name, num_classes=0, **{**SMALL, **kwargs}).eval()


@pytest.mark.parametrize(
    ('name', 'prefix'),
    [
        ('vit_small_patch16_224', 1),
        ('vit_small_patch16_dinov3', 5),
        ('vit_small_patch14_reg4_dinov2', 5),
        ('beit_base_patch16_224', 1),
        ('deit_small_distilled_patch16_224', 2),
    ],
)
def test_vits_of_timm_show_what_they_see(name: str, prefix: int) -> None:
    """Attention is that which timm itself shows, where it is not fused away."""
    vit: Any = build(name, in_chans=3)
    model = TimmViT(vit, RGB)
    side = vit.patch_embed.img_size[0]
    n = side // model.patch_size
    x = torch.randn(1, 3, side, side)
    seen = model.observe(x, block=0, rollout=True)
    assert model.sensors == ('s2',)
    assert model.num_prefix_tokens == prefix
    assert seen.tokens.shape == (1, prefix + n * n, 32)
    torch.testing.assert_close(seen.tokens, vit.forward_features(x), atol=1e-5, rtol=1e-4)
    extracted: list[Tensor] = []
    vit.blocks[0].attn.fused_attn = False
    vit.blocks[0].attn.attn_drop.register_forward_hook(lambda m, a, out: extracted.append(out))
    vit.forward_features(x)
    torch.testing.assert_close(
        seen.attention['s2'], extracted[0][:, :, 0, prefix:].unflatten(-1, (n, n))
    )
    assert seen.rollout['s2'].shape == (1, n, n)
    assert torch.equal(
        model.observe(x, block=-1, query=torch.tensor([5])).attention['s2'],
        model.observe(x, block=1, query=torch.tensor([5])).attention['s2'],
    )


def test_sizes() -> None:
    x = torch.randn(1, 3, 32, 48)
    assert TimmViT(
        build('vit_tiny_patch16_224', dynamic_img_size=True), RGB
    ).observe(x).tokens.shape == (1, 7, 32)  # fmt: skip
    with pytest.raises(ValueError, match=r'needs 224 x 224 px, not 32 x 48.*dynamic_img_size'):
        TimmViT(build('vit_tiny_patch16_224'), RGB).observe(x)


def test_what_it_cannot_do_is_said() -> None:
    without: Any = build('vit_base_patch16_siglip_224', dynamic_img_size=True)
    model, x = TimmViT(without, RGB), torch.randn(1, 3, 32, 32)
    assert not has_cls_token(model)
    assert model.observe(x).tokens.shape == (1, 4, 32)
    assert model.observe(x, block=0, query=torch.tensor([1])).attention['s2'].shape == (1, 2, 2, 2)
    for kwargs in ({'block': 0}, {'rollout': True}):
        with pytest.raises(ValueError, match='no CLS token'):
            model.observe(x, **kwargs)
    with pytest.raises(ValueError, match='needs all of its sensors'):
        model.observe(x, present=torch.tensor([[False]]))
    with pytest.raises(BandError, match='3 channels, but 2 bands'):
        TimmViT(without, RGB[:2])
    with pytest.raises(ValueError, match='ResNet is not a ViT of timm'):
        TimmViT(timm.create_model('resnet10t', num_classes=0), RGB)
    assert has_cls_token(build('vit_tiny_patch16_224'))
    assert has_cls_token(MultiSensorViT(**SMALL))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_of_a_named_model(tmp_path: Path, suffix: str) -> None:
    vit: Any = timm.create_model('vit_tiny_patch16_224', in_chans=3, num_classes=5)
    path = tmp_path / f'weights{suffix}'
    if suffix == '.pth':
        torch.save({'state_dict': vit.state_dict()}, path)
    else:
        save_file(vit.state_dict(), path)
    model = load_model(path, 'vit_tiny_patch16_224', RGB)
    assert isinstance(model, TimmViT)
    assert not model.training
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(
        model.observe(x).tokens, vit.eval().forward_features(x), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(
        BandError, match="bands of the channels of 'vit_tiny_patch16_224' are unknown"
    ):
        load_model(path, 'vit_tiny_patch16_224')
    with pytest.raises(CheckpointError, match=r"do not fit 'vit_small_patch16_224'"):
        load_model(path, 'vit_small_patch16_224', RGB)
    with pytest.raises(CheckpointError, match=r'gone\.pth: no such file'):
        load_model(tmp_path / 'gone.pth', 'vit_tiny_patch16_224', RGB)


def _save(task: Any, path: Path) -> Path:
    torch.save(
        {'state_dict': task.state_dict(), 'hyper_parameters': dict(task.hparams)},
        path,
    )
    return path


def test_fine_tuned_checkpoints_of_torchgeo(tmp_path: Path) -> None:
    name = 'geofm_vit_tiny_patch16_linear'
    tasks: dict[str, Any] = {
        'model': Classification(model=name, in_channels=15, num_classes=4),
        'model.encoder.model': SemanticSegmentation(
            model='dpt', backbone=f'tu-{name}', in_channels=15, num_classes=3
        ),
    }
    for where, task in tasks.items():
        model = load_model(_save(task, tmp_path / 'a.ckpt'))
        assert isinstance(model, MultiSensorViT)
        assert len(model.bands) == 15
        inner = task.get_submodule(where)
        x = torch.randn(1, 15, 32, 32)
        torch.testing.assert_close(model.forward_features(x), inner.eval().forward_features(x))
    one_sensor = Classification(model='geofm_vit_tiny_patch16_s1', in_channels=2, num_classes=4)
    model = load_model(_save(one_sensor, tmp_path / 'b.ckpt'))
    assert model.bands == ('VV', 'VH')


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / 'a.ckpt'
    path.write_text('text')
    with pytest.raises(CheckpointError, match=r'a\.ckpt: not a readable PyTorch checkpoint'):
        load_model(path)
    with pytest.raises(CheckpointError, match=r'a\.ckpt: not a readable'):
        load_model(path, 'vit_tiny_patch16_224', RGB)
    torch.save({'state_dict': {}, 'hyper_parameters': {'lr': 1}}, path)
    with pytest.raises(CheckpointError, match=r'a\.ckpt: a checkpoint of another task'):
        load_model(path)


def test_another_number_of_channels_is_refused_with_the_names() -> None:
    model = TimmViT(build('vit_small_patch16_224', in_chans=3, img_size=32), RGB)
    x = torch.randn(1, 13, 32, 32)
    for way in (model, model.observe):
        with pytest.raises(BandError, match=r"13 channels, but 3 bands are expected: \['B04'"):
            way(x)


def of_dinov2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of DINOv2's own files, whose registers have no positions but CLS has."""
    renamed = {key.replace('reg_token', 'register_tokens'): v for key, v in weights.items()}
    cls, patches = torch.randn(1, 1, 32), renamed['pos_embed']
    return {
        **renamed,
        'cls_token': renamed['cls_token'] - cls,
        'pos_embed': torch.cat([cls, patches], dim=1),
        'mask_token': torch.zeros(1, 32),
    }


def of_dinov3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of DINOv3's own files, with rotary periods and biases that are all zero."""
    renamed = {
        key.replace('reg_token', 'storage_tokens')
        .replace('gamma_1', 'ls1.gamma')
        .replace('gamma_2', 'ls2.gamma'): value
        for key, value in weights.items()
    }
    zeros = {f'blocks.{i}.attn.qkv.bias': torch.zeros(96) for i in range(2)}
    masks = {f'blocks.{i}.attn.qkv.bias_mask': torch.zeros(96) for i in range(2)}
    others = {'rope_embed.periods': torch.ones(4), 'mask_token': torch.zeros(1, 32)}
    return renamed | zeros | masks | others


@pytest.mark.parametrize(
    ('name', 'published'),
    [('vit_small_patch14_reg4_dinov2', of_dinov2), ('vit_small_patch16_dinov3', of_dinov3)],
)
def test_weights_as_their_authors_publish_them(
    tmp_path: Path, name: str, published: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    vit: Any = build(name, dynamic_img_size=True)
    torch.save(published(vit.state_dict()), tmp_path / 'weights.pth')
    model = load_model(tmp_path / 'weights.pth', name, RGB, SMALL)
    side = vit.patch_embed.img_size[0]
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(
            model.observe(x).tokens, vit.forward_features(x), atol=3e-4, rtol=1e-4
        )
    assert not capsys.readouterr().out
