"""Fit a geofm backbone to one with other bands, patches, positions or registers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from geofm.models.checkpoints.files import CheckpointError
from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.fit import load_into
from geofm.models.weights.layouts import find_vit
from geofm.models.weights.one_sensor import vit_weights
from geofm.printing import one_line


def fit_backbone(
    backbone: MultiSensorViT, source: MultiSensorViT, weights: Mapping[str, Tensor]
) -> list[str]:
    """Load the weights of a backbone into one that may differ in properties that can be fitted.

    Bands, patch size, image size and registers of each encoder are fitted as for any ViT, see
    :func:`geofm.models.weights.fit.load_into`. Sensors, fusion and attention heads must be equal.

    Args:
        backbone: The backbone to load into; changed in place. Its head keeps its weights.
        source: Backbone with the architecture of the weights, on any device.
        weights: The weights.

    Returns:
        A note for each change; empty if all weights fit as they are.

    Raises:
        CheckpointError: If the backbones differ in other properties.
    """
    _check_build(source, backbone)
    own = {key: value for key, value in backbone.state_dict().items() if key[:5] != 'head.'}
    weights = {key: value for key, value in weights.items() if key[:5] != 'head.'}
    same = source.encoder_bands == backbone.encoder_bands and own.keys() == weights.keys()
    if same and all(own[key].shape == weights[key].shape for key in own):
        backbone.load_state_dict(weights, strict=False)
        return []
    notes: list[str] = []
    for key, name in backbone.patch_embed_names.items():
        encoder: Any = backbone.encoders[backbone.encoder_of(key)]
        of_source: Any = source.encoders[source.encoder_of(key)]
        found = load_into(
            encoder,
            find_vit(vit_weights(source, weights, key, fold=False)),
            backbone.encoder_bands[key],
            source.encoder_bands[key],
            of_source.patch_embed.grid_size,
            into=name.split('.', 2)[2],
        )
        notes += [f'encoder of {key}: {note}' for note in found]
    rest = {key: value for key, value in weights.items() if not key.startswith('encoders.')}
    if 'stand_in' in rest and rest['stand_in'].shape != own['stand_in'].shape:
        rest['stand_in'] = _fit_missing_tokens(rest['stand_in'], own['stand_in'])
    try:
        backbone.load_state_dict(rest, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f'its weights do not fit: {one_line(error)}') from error
    return notes


def _fit_missing_tokens(theirs: Tensor, own: Tensor) -> Tensor:
    """Fit missing-sensor tokens to another number of registers: use those of CLS and patch."""
    fitted = own.clone()
    with torch.no_grad():
        fitted[:, 0], fitted[:, -1] = theirs[:, 0].to(own), theirs[:, -1].to(own)
    return fitted


def _check_build(theirs: MultiSensorViT, ours: MultiSensorViT) -> None:
    """Check properties that cannot be fitted."""
    for name, describe in (
        ('encoders', lambda model: list(model.encoder_bands)),
        ('ViTs', lambda model: list(model.encoders)),
        ('fusion', _fusion),
        ('attention heads', _heads),
    ):
        there, here = describe(theirs), describe(ours)
        if there != here:
            raise CheckpointError(
                f'its model has {name} {there}, but yours has {here}. Make them equal, or load '
                f'encoders only: weights: {files(ours)}, or one of them'
            )


def _heads(model: MultiSensorViT) -> list[int]:
    encoders: list[Any] = list(model.encoders.values())
    return [encoder.blocks[0].attn.num_heads for encoder in encoders]


def _fusion(model: MultiSensorViT) -> str:
    return 'none' if model.fusion is None else model.fusion.describe(model.sensors)


def files(model: MultiSensorViT) -> str:
    """Describe how to give a file per encoder of a model, for messages.

    Args:
        model: The model.

    Returns:
        A text such as ``{a: FILE, b: FILE}``.
    """
    return '{' + ', '.join(f'{key}: FILE' for key in model.encoder_bands) + '}'
