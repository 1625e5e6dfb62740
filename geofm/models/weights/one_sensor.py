"""Extract the ViT of one sensor, or of early fusion, from a model."""

from collections.abc import Mapping

from torch import Tensor

from geofm.models.multisensor import MultiSensorViT

_PATCH_EMBED = 'patch_embed.'


def vit_weights(
    model: MultiSensorViT, weights: Mapping[str, Tensor], key: str, fold: bool = True
) -> dict[str, Tensor]:
    """Return the weights of the ViT of one patch embedding, named as in timm's ViT.

    For joint fusion, the result is the joint ViT with the patch embedding of that sensor. With the
    sensor embedding added to the positions, its tokens are those of the model with that sensor
    alone and without dates.

    Args:
        model: The model, on any device.
        weights: Weights of the model.
        key: A key of :attr:`~geofm.models.MultiSensorViT.encoder_bands`.
        fold: Whether to add the sensor embedding to the positions.

    Returns:
        The weights.
    """
    encoder, name = model.encoder_of(key), model.patch_embed_names[key]
    prefix = f'encoders.{encoder}.'
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if name == f'{prefix}patch_embed':
        return own
    of_sensor = f'{name.removeprefix(prefix)}.'
    found = {k: v for k, v in own.items() if not k.startswith(_PATCH_EMBED)} | {
        _PATCH_EMBED + k.removeprefix(of_sensor): v
        for k, v in own.items()
        if k.startswith(of_sensor)
    }
    if fold and 'pos_embed' in found:
        positions = found['pos_embed'].clone()
        encoder_module = model.get_submodule(f'encoders.{encoder}')
        prefix_tokens = 0 if encoder_module.no_embed_class else model.num_prefix_tokens
        positions[:, prefix_tokens:] += weights['sensor_embed'][model.sensors.index(key)]
        found['pos_embed'] = positions
    return found
