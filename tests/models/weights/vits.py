"""ViTs with random weights in the formats of other projects."""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

#: The smallest that still has everything.
SMALL: dict[str, Any] = {'embed_dim': 32, 'depth': 3, 'num_heads': 2}


def randomise(model: nn.Module) -> None:
    """Replace all weights by random values that no initialisation produces."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        with torch.no_grad():
            if 'gamma' in name or 'norm' in name:
                parameter.add_(0.2 * noise)
            elif any(part in name for part in ('token', 'pos_embed')):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(0.05 * noise)


def timm_vit(name: str = 'vit_small_patch14_reg4_dinov2', **kwargs: Any) -> VisionTransformer:
    """Build a timm ViT with random weights for images of any size."""
    kwargs = {'num_classes': 0, 'dynamic_img_size': True, **kwargs}
    model = timm.create_model(name, **kwargs).eval()
    assert isinstance(model, VisionTransformer)
    randomise(model)
    return model


def dinov2_state(model: VisionTransformer, registers: int, swiglu: bool = False) -> dict[str, Any]:
    """Make random weights in the layout of DINOv2's files, for the architecture of a timm ViT."""
    width = model.embed_dim
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key in ('cls_token', 'reg_token', 'pos_embed'):
            continue
        if swiglu:
            key = key.replace('mlp.fc1', 'mlp.w12').replace('mlp.fc2', 'mlp.w3')
        state[key] = value
    patches = model.patch_embed.num_patches
    state['cls_token'] = torch.randn(1, 1, width)
    state['pos_embed'] = torch.randn(1, 1 + patches, width)
    state['mask_token'] = torch.randn(1, width)
    if registers:
        state['register_tokens'] = torch.randn(1, registers, width)
    return state


def load_dinov2(model: VisionTransformer, state: dict[str, Tensor]) -> None:
    """Load weights in DINOv2's layout into a timm ViT with timm's conversion."""
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))


def chunked(state: dict[str, Tensor], chunks: int, depth: int) -> dict[str, Tensor]:
    """Rename blocks to chunks, as in DINOv2 training with FSDP."""
    size = depth // chunks
    out = {}
    for key, value in state.items():
        if key.startswith('blocks.'):
            _, block, *rest = key.split('.')
            key = '.'.join(['blocks', str(int(block) // size), block, *rest])
        out[key] = value
    return out
