import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geofm.models import SimpleFeaturePyramid


@pytest.mark.parametrize('patch_size', [4, 8, 14, 16, 32])
@pytest.mark.parametrize('strides', [(4, 8, 16, 32), (4, 8, 16, 16), (4, 8), ()])
def test_maps_have_their_strides(patch_size: int, strides: tuple[int, ...]) -> None:
    size = (224, 448)
    pyramid = SimpleFeaturePyramid(48, patch_size, strides, width=8)
    maps = pyramid(torch.randn(2, 48, size[0] // patch_size, size[1] // patch_size), size)
    assert [tuple(m.shape) for m in maps] == [(2, 8, size[0] // s, size[1] // s) for s in strides]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise over the channels at each pixel."""
    mean = x.mean(dim=1, keepdim=True)
    variance = x.var(dim=1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize('patch_size', [16, 14])
def test_levels_are_those_of_vitdet(patch_size: int) -> None:
    """Reference implementation with the paper's operations."""
    pyramid = SimpleFeaturePyramid(16, patch_size, width=8)
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter)
    w = pyramid.state_dict()
    size = (224, 448)
    x = torch.randn(2, 16, size[0] // patch_size, size[1] // patch_size)

    def deconv(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, w[f'{name}.weight'], w[f'{name}.bias'], stride=2)

    finest = deconv(x, 'levels.0.scale.0')
    finest = layer_norm(finest, w['levels.0.scale.1.weight'], w['levels.0.scale.1.bias'])
    finest = deconv(F.gelu(finest), 'levels.0.scale.3')
    scaled = [finest, deconv(x, 'levels.1.scale.0'), x, F.max_pool2d(x, 2)]
    assert [m.shape[1] for m in scaled] == [4, 8, 16, 16]
    for i, (level, got) in enumerate(zip(scaled, pyramid(x, size), strict=True)):
        stride = pyramid.strides[i]
        asked = (size[0] // stride, size[1] // stride)
        level = F.interpolate(level, asked, mode='bilinear', antialias=True)
        for conv, norm in ((0, 1), (2, 3)):
            out = f'levels.{i}.output'
            level = F.conv2d(level, w[f'{out}.{conv}.weight'], padding=conv // 2)
            level = layer_norm(level, w[f'{out}.{norm}.weight'], w[f'{out}.{norm}.bias'])
        torch.testing.assert_close(got, level, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('patch_size', [8, 16])
def test_a_patch_reaches_only_its_own_ground(patch_size: int) -> None:
    """A patch affects its own pixels and, by the 3 x 3 convolution, their neighbours."""
    pyramid = SimpleFeaturePyramid(16, patch_size, (4, 8), width=8)
    x = torch.randn(1, 16, 8, 8)
    changed = x.clone()
    changed[..., 3, 5] += 1
    size = (8 * patch_size, 8 * patch_size)
    for stride, a, b in zip((4, 8), pyramid(x, size), pyramid(changed, size), strict=True):
        rows, columns = (a != b).any(dim=1)[0].nonzero().T
        scale = patch_size // stride
        assert (rows.min(), rows.max()) == (3 * scale - 1, 4 * scale)
        assert (columns.min(), columns.max()) == (5 * scale - 1, 6 * scale)


def test_a_resized_map_lies_where_it_lay() -> None:
    """With patches of 14 px, resizing does not shift the map."""
    pyramid = SimpleFeaturePyramid(16, 14, (4, 8, 16, 32), width=8)
    x = torch.randn(1, 16, 16, 16)
    changed = x.clone()
    changed[..., :8, 8:] += 1
    for a, b in zip(pyramid(x, (224, 224)), pyramid(changed, (224, 224)), strict=True):
        moved = (a - b).abs().mean(dim=1)[0]
        half = len(moved) // 2
        # The border itself is blurred, by at most three pixels.
        assert (moved[: half - 3, half + 3 :] > 0).all()
        assert (moved[half + 3 :] == 0).all()
        assert (moved[:, : half - 3] == 0).all()
