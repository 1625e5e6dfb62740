"""Names and shapes by which others keep a ViT: timm's, and DINOv2's own.

Inside, a ViT is held as timm holds its ViTs with registers (``no_embed_class``): patches have
positions, CLS and registers none. A position that another layout gives to CLS or a register is
added to that token, which is what its model does first of all.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geofm.models.checkpoints.files import CheckpointError

#: What every ViT here has, whatever stands before the name.
_PATCH_EMBED = 'patch_embed.proj.weight'

#: Numbers of dimensions of what is looked into.
_DIMS = {
    _PATCH_EMBED: (4,),
    'blocks.0.mlp.fc1.weight': (2,),
    'blocks.0.mlp.fc2.weight': (2,),
    'pos_embed': (3, 4),
    'cls_token': (3,),
    'reg_token': (3,),
}

#: Where training frameworks keep weights among other things.
_WRAPPERS = ('teacher', 'model', 'state_dict')

#: DINOv2's names, and timm's.
_TO_TIMM = (
    # Blocks in chunks for FSDP: their second number counts through.
    (re.compile(r'^blocks\.\d+\.(\d+)\.'), r'blocks.\1.'),
    (re.compile(r'\.mlp\.w12\.'), '.mlp.fc1.'),
    (re.compile(r'\.mlp\.w3\.'), '.mlp.fc2.'),
    (re.compile(r'^register_tokens$'), 'reg_token'),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What of a ViT's build must be equal for its weights to fit.

    Attributes:
        width: Width of the tokens.
        depth: Number of blocks.
        hidden: Width inside the feed-forward layers.
        gated: Whether these are SwiGLU.
    """

    width: int
    depth: int
    hidden: int
    gated: bool

    def __str__(self) -> str:
        ffn = 'SwiGLU' if self.gated else 'MLP'
        return f'width {self.width}, depth {self.depth}, {ffn} of {self.hidden}'


def architecture(tensors: Mapping[str, Tensor]) -> Architecture:
    """Read the build of a ViT off its weights.

    Args:
        tensors: Weights in timm's layout.

    Returns:
        The build.

    Raises:
        KeyError: If they are not those of such a ViT.
    """
    blocks = {key.split('.')[1] for key in tensors if key.startswith('blocks.')}
    inner, outer = (tensors[f'blocks.0.mlp.{name}.weight'] for name in ('fc1', 'fc2'))
    hidden = outer.shape[1]
    return Architecture(len(outer), len(blocks), hidden, len(inner) == 2 * hidden)


def find_vit(content: Any, prefix: str | None = None) -> dict[str, Tensor]:
    """Find the one ViT in what a file holds.

    Args:
        content: A state dictionary, of the ViT itself or of a model around it; or a dictionary
            that holds one, as DINOv2's ``{'teacher': ...}`` or a Lightning checkpoint does.
        prefix: What stands before its names; by default the only thing that does.

    Returns:
        Its weights in timm's names, in float32.

    Raises:
        CheckpointError: If there is none, or more than one.
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
            "no ViT that is known here: neither DINOv2's names, nor timm's, nor this project's"
        )
    for name, dims in _DIMS.items():
        if name in tensors and tensors[name].ndim not in dims:
            raise CheckpointError(f'{name} is of shape {tuple(tensors[name].shape)}: damaged')
    return tensors


def _only_prefix(keys: list[str]) -> str:
    pattern = re.compile(rf'(.*\.|){re.escape(_PATCH_EMBED)}')
    prefixes = [match[1] for key in keys if (match := pattern.fullmatch(key))]
    # A whole training state holds the student too.
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
    """Give patches alone a position: those of CLS and registers are added to these tokens.

    Args:
        tensors: Weights in timm's layout, with or without positions of CLS and registers.
        grid: Patches along each axis, of the model to load into: taken for the source's grid if
            that is not square.
        source_grid: The source's grid, where it is known.

    Returns:
        Weights; ``pos_embed`` is of shape (1, H, W, D).

    Raises:
        CheckpointError: If the positions are on no grid that could be told. On a tiny grid more
            than one reading may be possible: the first that fits of no other token, CLS, and
            CLS and registers having positions.
    """
    tensors = dict(tensors)
    positions = tensors.pop('pos_embed', None)
    if positions is None:
        return tensors
    tokens = [name for name in ('cls_token', 'reg_token') if name in tensors]
    # How many of the tokens have a position, and what the patches' grid then is.
    for folded in range(len(tokens) + 1 if positions.ndim == 3 else 0):
        lengths = [tensors[name].shape[1] for name in tokens[:folded]]
        patches = positions.shape[1] - sum(lengths)
        shape = source_grid or _grid(patches, grid)
        if shape is not None and patches == math.prod(shape):
            break
    else:
        raise CheckpointError(f'positions of shape {tuple(positions.shape)} are on no square grid')
    *of_tokens, of_patches = positions.split([*lengths, patches], dim=1)
    for name, position in zip(tokens, of_tokens, strict=False):
        tensors[name] = tensors[name] + position
    tensors['pos_embed'] = of_patches.unflatten(1, shape)
    return tensors


def _grid(patches: int, wanted: tuple[int, int]) -> tuple[int, int] | None:
    """Grid of so many patches: a square, or else the one wanted."""
    side = math.isqrt(max(patches, 0))
    if side * side == patches:
        return side, side
    return wanted if patches == math.prod(wanted) else None


def to_dinov2(tensors: Mapping[str, Tensor], mask_token: Tensor) -> dict[str, Tensor]:
    """Name a ViT's weights as DINOv2 does.

    Args:
        tensors: Weights in timm's layout, as :func:`fold_positions` gives them.
        mask_token: The token in place of masked patches, of shape (D,).

    Returns:
        Weights by DINOv2's names; the position of CLS is zero.
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
