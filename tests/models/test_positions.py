"""Positions at other sizes: bicubic and antialiased, against the kernel written out."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from geofm.models import MultiSensorViT, View

SMALL: dict[str, Any] = {
    'patch_size': 8,
    'embed_dim': 16,
    'depth': 1,
    'num_heads': 2,
    'sensors': ['s2'],
    'in_chans': 13,
    'reg_tokens': 2,
}


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel (1981), a = -1/2."""
    x = abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampling(old: int, new: int) -> np.ndarray:
    """Matrix (new, old): the kernel widened by the factor of a reduction, edges renormalised."""
    factor = old / new
    centres = (np.arange(new) + 0.5) * factor
    distances = np.arange(old) + 0.5 - centres[:, None]
    weights = cubic(distances / max(factor, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


def only_positions(model: Any) -> None:
    """Leave of the tokens what they start with, normalised."""
    for encoder in model.encoders.values() if hasattr(model, 'encoders') else [model]:
        for parameter in [*encoder.patch_embed.parameters(), *encoder.blocks.parameters()]:
            nn.init.zeros_(parameter)
        nn.init.normal_(encoder.pos_embed)
        nn.init.normal_(encoder.cls_token)
        nn.init.normal_(encoder.reg_token)


def normalised(tokens: np.ndarray) -> np.ndarray:
    tokens = tokens - tokens.mean(axis=-1, keepdims=True)
    return tokens / np.sqrt((tokens**2).mean(axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize('stored', [112, 56])
@pytest.mark.parametrize('size', [(112, 112), (48, 48), (56, 72), (160, 24)])
def test_positions_are_resampled_on_their_grid(stored: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = MultiSensorViT(img_size=stored, **SMALL)
    only_positions(model)
    encoder: Any = model.encoders['s2']
    old = stored // 8
    grid = encoder.pos_embed.detach().double().numpy().reshape(old, old, 16)
    down, across = (resampling(old, side // 8) for side in size)
    patches = np.einsum('ij,jkd,lk->ild', down, grid, across).reshape(-1, 16)
    # CLS and registers have no position: it would be one more token added to theirs.
    prefix = [encoder.cls_token, encoder.reg_token]
    tokens = np.concatenate([part.detach().double().numpy()[0] for part in prefix] + [patches])
    image = torch.randn(1, 13, *size)
    with torch.no_grad():
        found = model.forward_features(image)[0].double().numpy()
        (packed,) = model.forward_views([View(image, patches=torch.arange(len(patches)))])
    np.testing.assert_allclose(found, normalised(tokens), atol=2e-5)
    np.testing.assert_allclose(packed.patches.double().numpy(), normalised(patches), atol=2e-5)


@pytest.mark.parametrize('size', [112, 48, 160])
def test_positions_are_those_of_timms_dinov2(size: int) -> None:
    vit: Any = timm.create_model(
        'vit_small_patch14_reg4_dinov2',
        img_size=112,
        in_chans=13,
        num_classes=0,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        dynamic_img_size=True,
    )
    only_positions(vit)
    model = MultiSensorViT(img_size=112, **{**SMALL, 'reg_tokens': 4})
    encoder: Any = model.encoders['s2']
    encoder.load_state_dict(vit.state_dict())
    image: Tensor = torch.randn(2, 13, size, size)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(image), vit.forward_features(image), atol=1e-5, rtol=1e-5
        )
