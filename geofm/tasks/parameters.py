"""DINOv2's parameter groups, gradient norms per sub-network, and the precision of weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geofm.losses import gathered

#: Data type of autocast for each mixed precision of Lightning.
AUTOCAST = {'bf16-mixed': torch.bfloat16, '16-mixed': torch.float16}

_BLOCK = re.compile(r'\bblocks\.(\d+)\.')
_STEM = re.compile(
    r'\b(patch_embed|pos_embed|cls_token|reg_token|mask_token|sensor_embed|day_of_year)\b'
)


def parameter_groups(
    student: nn.Module, depth: int, layer_decay: float = 0.9, patch_embed_lr_mult: float = 0.2
) -> list[dict[str, Any]]:
    """Group parameters by the factors of their learning rate and weight decay.

    As in DINOv2, the learning rate is multiplied by *layer_decay* per block from the last block to
    the first, and by *patch_embed_lr_mult* in patch embeddings. The last layers of the heads have
    their own schedule. Vectors (biases, norms, layer scales) have no weight decay; positions,
    tokens and both parts of a weight-normalised layer do. Fusion and heads have the full learning
    rate.

    Args:
        student: Module with children ``backbone`` and heads.
        depth: Number of blocks of the backbone.
        layer_decay: Factor per block.
        patch_embed_lr_mult: Additional factor of patch embeddings.

    Returns:
        Parameter groups of an optimiser with the keys ``params``, ``names``, ``lr_mult``,
        ``wd_mult`` and ``last_layer``.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_mult = layer_scale(name, depth, layer_decay) if name.startswith('backbone.') else 1.0
        if 'patch_embed' in name:
            lr_mult *= patch_embed_lr_mult
        wd_mult = 0.0 if parameter.ndim < 2 else 1.0
        key = (lr_mult, wd_mult, 'last_layer' in name)
        if key not in groups:
            names = ('lr_mult', 'wd_mult', 'last_layer')
            groups[key] = {'params': [], 'names': [], **dict(zip(names, key, strict=True))}
        groups[key]['params'].append(parameter)
        groups[key]['names'].append(name)
    return list(groups.values())


def layer_scale(name: str, depth: int, layer_decay: float) -> float:
    """Compute the learning rate factor of a backbone's parameter.

    Args:
        name: Name of the parameter.
        depth: Number of blocks L of the backbone.
        layer_decay: Factor d per block.

    Returns:
        d^(L - i) in block i, counted from 0; d^(L + 1) in patch embeddings, positions and tokens;
        1 in fusion, last norm and head.
    """
    if '.fusion.' in f'.{name}':
        return 1.0
    if block := _BLOCK.search(name):
        return layer_decay ** (depth - int(block[1]))
    return layer_decay ** (depth + 1) if _STEM.search(name) else 1.0


def scale_learning_rates(optimizer: Optimizer, scales: Mapping[int, float]) -> None:
    """Split the parameter groups of an optimiser by learning rate factors.

    Args:
        optimizer: The optimiser before its first step; changed in place.
        scales: Factor by the ``id`` of the parameter; 1 for other parameters.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        split: dict[float, list[nn.Parameter]] = {}
        for parameter in group['params']:
            split.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
        for scale, parameters in split.items():
            rates: dict[str, Any] = {
                k: scale * group[k] for k in ('lr', 'initial_lr') if k in group
            }
            groups.append({**group, 'params': parameters, **rates})
    optimizer.param_groups[:] = groups


def gradient_norms(trained: nn.ModuleDict) -> dict[str, Tensor]:
    """Compute the gradient norm of each sub-network.

    Args:
        trained: The sub-networks by name.

    Returns:
        Norms by name; 0 without gradients. For sharded weights, the norms over all ranks.
    """
    norms = {
        name: nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        for name, module in trained.items()
    }
    return {name: gathered(norm) for name, norm in norms.items()}


def check_precision(task: nn.Module) -> None:
    """Check that weights, averages and centres are not in half precision.

    They change by less than half precision can resolve: bfloat16 has steps of 0.4 %, but a teacher
    with a momentum of 0.9995 moves by 0.05 % of its distance from the student.

    Args:
        task: The task before training.

    Raises:
        ValueError: If a floating-point parameter or buffer has fewer than 32 bits.
    """
    for name, value in (*task.named_parameters(), *task.named_buffers()):
        if value.is_floating_point() and torch.finfo(value.dtype).bits < 32:
            raise ValueError(
                f'{name} is in {str(value.dtype).removeprefix("torch.")}, which cannot represent '
                'the small updates of the EMA teacher, the centres and AdamW. Keep the weights in '
                'float32 and compute in half precision, with precision=bf16-mixed or 16-mixed'
            )
