"""Low-rank adapters (LoRA) in a ViT, whose state dict is that of the plain ViT.

A layer with an adapter computes W x + alpha / r B A x. In a state dict it has the entry of the
plain layer: the merged weight W + alpha / r B A under the original name. Checkpoints can therefore
be read as those of a plain model by TorchGeo, timm and geofm. For resuming, W, A and B are stored
separately, see :func:`adapter_state`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geofm.models.checkpoints.files import CheckpointError

#: Name that peft gives to an adapter by default.
_NAME = 'default'

#: Names of the tensors of an adapter in :func:`adapter_state`.
_PARTS = ('base', 'a', 'b')


def add_adapters(
    model: nn.Module, names: Sequence[str], rank: int, alpha: float, dropout: float
) -> None:
    """Add adapters to linear layers, and freeze all other parameters of the model.

    Args:
        model: The model; changed in place.
        names: Names of linear layers in the model.
        rank: Rank r of the adapters.
        alpha: The output of the adapters is multiplied by alpha / r.
        dropout: Dropout probability of the adapters' input.

    Raises:
        ModuleNotFoundError: If the library peft is missing.
    """
    # Imported here because it imports transformers, which takes seconds.
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "LoRA needs the library peft: pip install 'geofm[lora]'"
        ) from error
    # A regular expression, because peft matches the names in a list as suffixes.
    pattern = '|'.join(re.escape(name) for name in names)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=f'(?:{pattern})'
    )
    inject_adapter_in_model(config, model)
    for layer in adapted_layers(model).values():
        layer.register_state_dict_post_hook(_save_merged)
        layer.register_load_state_dict_pre_hook(_load_merged)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Find the layers with an adapter.

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
    """Return the state of a model's adapters, for resuming bit-exactly.

    Args:
        model: The model.

    Returns:
        For each layer by name: 'base' of shape (out, in), 'a' of shape (r, in) and 'b' of shape
        (out, r).
    """
    return {
        name: {part: tensor.detach() for part, tensor in _parts(layer).items()}
        for name, layer in adapted_layers(model).items()
    }


def load_adapter_state(model: nn.Module, state: Any) -> None:
    """Load the state of adapters.

    Args:
        model: The model with adapters.
        state: Result of :func:`adapter_state`, from a file; not trusted.

    Raises:
        CheckpointError: If the state is invalid, or for other layers or another rank.
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
                    f"in the checkpoint's adapter of {name}, '{part}' is {found}, not "
                    f'{tuple(own.shape)}: resume with the same adapt.rank, or the file is damaged'
                )
            if not value.isfinite().all():
                raise CheckpointError(f"damaged: the checkpoint's adapter of {name} is not finite")
    with torch.no_grad():
        for name, layer in layers.items():
            for part, own in _parts(layer).items():
                own.copy_(state[name][part])


def _parts(layer: Any) -> dict[str, Tensor]:
    tensors = (layer.base_layer.weight, layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)
    return dict(zip(_PARTS, tensors, strict=True))


def _save_merged(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace the tensors of a layer with adapter by those of the plain layer."""
    base = layer.base_layer
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    with torch.no_grad():
        merged = base.weight + layer.get_delta_weight(_NAME).to(base.weight.dtype)
    state[f'{prefix}weight'] = merged
    if base.bias is not None:
        state[f'{prefix}bias'] = base.bias.detach()


def _load_merged(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a plain layer's weights, with an adapter that has no effect."""
    for name in ('weight', 'bias'):
        if prefix + name in state:
            state[f'{prefix}base_layer.{name}'] = state.pop(prefix + name)
            state[f'{prefix}lora_A.{_NAME}.weight'] = layer.lora_A[_NAME].weight.detach()
            state[f'{prefix}lora_B.{_NAME}.weight'] = torch.zeros_like(layer.lora_B[_NAME].weight)
