"""Low-rank adapters (LoRA) in a ViT, whose weights are those of the plain ViT wherever saved.

A layer with an adapter computes W x + alpha / r B A x. Its entry in a state dict is the plain
layer's: the merged weight W + alpha / r B A under the name that the weight had before. Every
reader of checkpoints, TorchGeo's, timm's and ours, thus finds an ordinary model. What resuming
needs beside that, W, A and B themselves, is kept apart: see :func:`adapter_state`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geofm.models.checkpoints.files import CheckpointError

#: What peft calls an adapter that is given no name.
_NAME = 'default'

#: Tensors of an adapter: those of :func:`adapter_state`.
_PARTS = ('base', 'a', 'b')


def add_adapters(
    model: nn.Module, names: Sequence[str], rank: int, alpha: float, dropout: float
) -> None:
    """Give linear layers an adapter, in place; all other parameters of the model are frozen.

    Args:
        model: The model; its class and the names of its modules stay.
        names: Names of linear layers within it.
        rank: Rank r of the adapters.
        alpha: The adapter's output is multiplied by alpha / r.
        dropout: Fraction of an adapter's input that is dropped in training.

    Raises:
        ModuleNotFoundError: If the library peft is missing.
    """
    # Imports transformers, which takes seconds.
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "LoRA needs the library peft: pip install 'geofm[lora]'"
        ) from error
    # An expression, since peft takes a name of a list for any name that ends with it.
    pattern = '|'.join(re.escape(name) for name in names)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=f'(?:{pattern})'
    )
    inject_adapter_in_model(config, model)
    for layer in adapted_layers(model).values():
        layer.register_state_dict_post_hook(_save_merged)
        layer.register_load_state_dict_pre_hook(_load_merged)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter.

    Args:
        model: The model.

    Returns:
        The layers by name.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Module) and hasattr(module, 'lora_A')
    }


def adapter_state(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What resuming needs of a model's adapters, to the bit.

    Args:
        model: The model.

    Returns:
        Of each layer by name 'base' of shape (out, in), 'a' of (r, in) and 'b' of (out, r).
    """
    return {
        name: {part: tensor.detach() for part, tensor in _parts(layer).items()}
        for name, layer in adapted_layers(model).items()
    }


def load_adapter_state(model: nn.Module, state: Any) -> None:
    """Load adapters that were saved.

    Args:
        model: The model, with adapters.
        state: What :func:`adapter_state` gave, out of a file.

    Raises:
        CheckpointError: If it is damaged, or not of these layers and this rank.
    """
    layers = adapted_layers(model)
    if not isinstance(state, Mapping) or state.keys() != layers.keys():
        raise CheckpointError(
            'the checkpoint has adapters of other layers: resume with the same adapt.targets and '
            'adapt.blocks'
        )
    for name, layer in layers.items():
        given = state[name]
        for part, own in _parts(layer).items():
            value = given.get(part) if isinstance(given, Mapping) else None
            if not isinstance(value, Tensor) or value.shape != own.shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else 'missing'
                raise CheckpointError(
                    f"the checkpoint's adapter of {name} has '{part}' {found}, not "
                    f'{tuple(own.shape)}: resume with the same adapt.rank, or the file is damaged'
                )
            if not value.isfinite().all():
                raise CheckpointError(f"the checkpoint's adapter of {name} is not finite: damaged")
    with torch.no_grad():
        for name, layer in layers.items():
            for part, own in _parts(layer).items():
                own.copy_(state[name][part])


def _parts(layer: Any) -> dict[str, Tensor]:
    tensors = (layer.base_layer.weight, layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)
    return dict(zip(_PARTS, tensors, strict=True))


def _save_merged(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace the tensors of a layer and its adapter by those of the plain layer."""
    base = layer.base_layer
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    with torch.no_grad():
        merged = base.weight + layer.get_delta_weight(_NAME).to(base.weight.dtype)
    state[f'{prefix}weight'] = merged
    if base.bias is not None:
        state[f'{prefix}bias'] = base.bias.detach()


def _load_merged(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take a plain layer's weights for those of the layer, with an adapter that does nothing."""
    for name in ('weight', 'bias'):
        if prefix + name in state:
            state[f'{prefix}base_layer.{name}'] = state.pop(prefix + name)
            state[f'{prefix}lora_A.{_NAME}.weight'] = layer.lora_A[_NAME].weight.detach()
            state[f'{prefix}lora_B.{_NAME}.weight'] = torch.zeros_like(layer.lora_B[_NAME].weight)
