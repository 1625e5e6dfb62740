"""Layouts of a ViT's weights: those of timm and of DINOv2's own code.

Internally, weights have the layout of timm's ViTs with registers (``no_embed_class``): patches have
positions, CLS and registers have none. If another layout has a position for CLS or a register, it
is added to that token, which is equivalent.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geofm.models.checkpoints.files import CheckpointError

#: Name of a weight that every ViT has, after any prefix.
_PATCH_EMBED = 'patch_embed.proj.weight'

#: Allowed numbers of dimensions of weights whose shapes are read.
_DIMS = {
    _PATCH_EMBED: (4,),
    'blocks.0.mlp.fc1.weight': (2,),
    'blocks.0.mlp.fc2.weight': (2,),
    'pos_embed': (3, 4),
    'cls_token': (3,),
    'reg_token': (3,),
}

#: Keys under which training scripts store weights.
_WRAPPERS = ('teacher', 'model', 'state_dict')

#: DINOv2's names and the corresponding names of timm.
_TO_TIMM = (
    # Blocks in chunks for FSDP: the second number is the index of the block.
    (re.compile(r'^blocks\.\d+\.(\d+)\.'), r'blocks.\1.'),
    (re.compile(r'\.mlp\.w12\.'), '.mlp.fc1.'),
    (re.compile(r'\.mlp\.w3\.'), '.mlp.fc2.'),
    (re.compile(r'^register_tokens$'), 'reg_token'),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """Properties of a ViT that must match to load its weights.

    Attributes:
        width: Width of the tokens.
        depth: Number of blocks.
        hidden: Hidden width of the feed-forward layers.
        gated: Whether the feed-forward layers are SwiGLU.
    """

    width: int
    depth: int
    hidden: int
    gated: bool

    def __str__(self) -> str:
        ffn = 'SwiGLU' if self.gated else 'MLP'
        return f'width {self.width}, depth {self.depth}, {ffn} of {self.hidden}'


def architecture(tensors: Mapping[str, Tensor]) -> Architecture:
    """Infer the architecture of a ViT from its weights.

    Args:
        tensors: Weights in timm's layout.

    Returns:
        The architecture.

    Raises:
        KeyError: If they are not the weights of such a ViT.
    """
    blocks = {key.split('.')[1] for key in tensors if key.startswith('blocks.')}
    inner, outer = (tensors[f'blocks.0.mlp.{name}.weight'] for name in ('fc1', 'fc2'))
    hidden = outer.shape[1]
    return Architecture(len(outer), len(blocks), hidden, len(inner) == 2 * hidden)


def find_vit(content: Any, prefix: str | None = None) -> dict[str, Tensor]:
    """Find the weights of the only ViT in the content of a file.

    Args:
        content: State dict of the ViT itself or of a model around it; or a dictionary that contains
            one, such as DINOv2's ``{'teacher': ...}`` or a Lightning checkpoint.
        prefix: Prefix of the names of the weights. Default: the only prefix in the file.

    Returns:
        The weights under timm's names, in float32.

    Raises:
        CheckpointError: If there is no ViT or more than one.
    """
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    state = (
        {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else {}
    )
    if prefix is None:
        prefix = _only_prefix(list(state))
    tensors = {
        _timm_name(key.removeprefix(prefix)): value.float()
        for key, value in state.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    if not {_PATCH_EMBED, 'blocks.0.mlp.fc1.weight', 'blocks.0.mlp.fc2.weight'} <= set(tensors):
        raise CheckpointError(
            "no supported ViT: its weights have neither DINOv2's, nor timm's, nor geofm's names"
        )
    for name, dims in _DIMS.items():
        if name in tensors and tensors[name].ndim not in dims:
            raise CheckpointError(f'damaged: {name} is of shape {tuple(tensors[name].shape)}')
    return tensors


def _only_prefix(keys: list[str]) -> str:
    pattern = re.compile(rf'(.*\.|){re.escape(_PATCH_EMBED)}')
    prefixes = [match[1] for key in keys if (match := pattern.fullmatch(key))]
    # The state of a whole training run also has the student.
    teachers = [prefix for prefix in prefixes if prefix.startswith('teacher')]
    found = teachers or prefixes
    if len(found) > 1:
        raise CheckpointError(f'more than one ViT: {sorted(found)}')
    return found[0] if found else ''


def _timm_name(key: str) -> str:
    for pattern, name in _TO_TIMM:
        key = pattern.sub(name, key)
    return key


def fold_positions(
    tensors: Mapping[str, Tensor],
    grid: tuple[int, int],
    source_grid: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Add the positions of CLS and registers to these tokens, so that only patches have positions.

    The number of positions may be ambiguous for tiny grids. The first of these interpretations that
    fits is used: positions of patches only, of CLS and patches, of CLS, registers and patches.

    Args:
        tensors: Weights in timm's layout, with or without positions of CLS and registers.
        grid: Grid of the model to load into, (rows, columns). It is used as the source's grid if
            the number of positions is not a square.
        source_grid: Grid of the source, if known.

    Returns:
        The weights, with ``pos_embed`` of shape (1, H, W, D).

    Raises:
        CheckpointError: If the grid of the positions cannot be determined.
    """
    tensors = dict(tensors)
    positions = tensors.pop('pos_embed', None)
    if positions is None:
        return tensors
    tokens = [name for name in ('cls_token', 'reg_token') if name in tensors]
    # Try how many tokens have a position, and whether the rest is a grid of patches.
    for folded in range(len(tokens) + 1 if positions.ndim == 3 else 0):
        lengths = [tensors[name].shape[1] for name in tokens[:folded]]
        patches = positions.shape[1] - sum(lengths)
        shape = source_grid or _grid(patches, grid)
        if shape is not None and patches == math.prod(shape):
            break
    else:
        raise CheckpointError(
            f'positions of shape {tuple(positions.shape)} do not form a square grid'
        )
    *of_tokens, of_patches = positions.split([*lengths, patches], dim=1)
    for name, position in zip(tokens, of_tokens, strict=False):
        tensors[name] = tensors[name] + position
    tensors['pos_embed'] = of_patches.unflatten(1, shape)
    return tensors


def _grid(patches: int, wanted: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid of a number of patches: a square, or the wanted grid if it fits."""
    side = math.isqrt(max(patches, 0))
    if side * side == patches:
        return side, side
    return wanted if patches == math.prod(wanted) else None


def to_dinov2(tensors: Mapping[str, Tensor], mask_token: Tensor) -> dict[str, Tensor]:
    """Convert a ViT's weights to DINOv2's layout.

    Args:
        tensors: Weights in timm's layout, as returned by :func:`fold_positions`.
        mask_token: Mask token of shape (D,).

    Returns:
        Weights under DINOv2's names. The position of CLS is zero.
    """
    gated = architecture(tensors).gated
    renamed = {'reg_token': 'register_tokens'}
    state = {}
    for key, value in tensors.items():
        if gated:
            key = key.replace('.mlp.fc1.', '.mlp.w12.').replace('.mlp.fc2.', '.mlp.w3.')
        state[renamed.get(key, key)] = value
    positions = state['pos_embed'].flatten(1, 2)
    state['pos_embed'] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return state | {'mask_token': mask_token[None]}
