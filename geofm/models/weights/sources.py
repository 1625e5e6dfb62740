"""Read the weights of one sensor's ViT from a file or from TorchGeo."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from torch import Tensor

from geofm.models.checkpoints.backbones import check_fit, describe_backbone
from geofm.models.checkpoints.definitions import take_up_sensors_of
from geofm.models.checkpoints.files import METADATA, CheckpointError
from geofm.models.checkpoints.model_file import Checkpoint, ModelFile, read_model
from geofm.models.checkpoints.trust import check_weights
from geofm.models.fusion import SINGLE
from geofm.models.weights.layouts import find_vit
from geofm.models.weights.one_sensor import vit_weights
from geofm.transforms import InputStatistics


class Source(TypedDict):
    """File of weights and the bands of its channels.

    Attributes:
        path: The file, or a name of weights in TorchGeo, e.g.
            ``ViTSmall16_Weights.SENTINEL2_ALL_DINO``.
        bands: Names of the channels, in their order.
    """

    path: str
    bands: NotRequired[list[str]]


class EncoderWeights(NamedTuple):
    """Weights of a ViT.

    Attributes:
        tensors: Weights in timm's layout.
        bands: Names of the channels, if known.
        mask_token: Mask token of shape (D,), if any.
        left: Names of unused parts of a geofm checkpoint.
        grid: Grid of the positions, if known.
        statistics: Statistics that normalised the input, if known.
    """

    tensors: dict[str, Tensor]
    bands: Sequence[str] | None = None
    mask_token: Tensor | None = None
    left: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    statistics: InputStatistics | None = None


def is_torchgeo(path: str) -> bool:
    """Return whether a source is the name of weights in TorchGeo.

    Args:
        path: A file, or such a name.

    Returns:
        True if it has the form of a name, and there is no such file.
    """
    return bool(re.fullmatch(r'\w+_Weights\.\w+', path)) and not Path(path).exists()


def read_encoder(path: str | ModelFile, sensor: str) -> EncoderWeights:
    """Read the ViT of one sensor.

    Args:
        path: A file, or the name of weights in TorchGeo.
        sensor: Key of the sensor, which selects the encoder in a geofm checkpoint.

    Returns:
        The weights.

    Raises:
        CheckpointError: If there are no such weights, or they cannot be read or are not those of a
            supported ViT.
    """
    if isinstance(path, str) and is_torchgeo(path):
        return _from_torchgeo(path)
    file = read_model(path)
    if file.pretrained is not None:
        return _from_checkpoint(file.pretrained, sensor)
    tensors = check_weights(find_vit(file.content), file.path)
    take_up_sensors_of(file.content, file.path)
    metadata = file.content.get(METADATA)
    bands = metadata.get('bands') if isinstance(metadata, Mapping) else None
    if not _are_names(bands):
        raise CheckpointError('damaged: the bands in its metadata are not a list of names')
    found = _with_mask_token(tensors, bands)
    return found._replace(statistics=file.statistics)


def _are_names(bands: Any) -> bool:
    return bands is None or (isinstance(bands, list) and all(isinstance(b, str) for b in bands))


def _with_mask_token(tensors: dict[str, Tensor], bands: Sequence[str] | None) -> EncoderWeights:
    mask_token = tensors.pop('mask_token', None)
    return EncoderWeights(tensors, bands, None if mask_token is None else mask_token.flatten())


def _from_torchgeo(name: str) -> EncoderWeights:
    from torchgeo.models import get_weight

    try:
        weight: Any = get_weight(name)
    except ValueError as error:
        raise CheckpointError('no such file, and no such weights in TorchGeo') from error
    if 'SENTINEL' not in weight.name:
        raise CheckpointError(
            "weights of another sensor: only TorchGeo's Sentinel-1 and Sentinel-2 weights fit"
        )
    state = weight.get_state_dict(progress=True, check_hash=True, weights_only=True)
    return _with_mask_token(find_vit(state), weight.meta['bands'])


def _from_checkpoint(checkpoint: Checkpoint, sensor: str) -> EncoderWeights:
    model = describe_backbone(checkpoint)
    check_fit(model.state_dict(), checkpoint.weights, checkpoint.path)
    if sensor == SINGLE and len(model.encoder_bands) == 1:
        (sensor,) = model.encoder_bands
    if sensor not in model.encoder_bands:
        raise CheckpointError(f'its model has encoders for {list(model.encoder_bands)} only')
    key = model.encoder_of(sensor)
    encoder: Any = model.encoders[key]
    others = {key.split('.')[0] for key in checkpoint.weights if not key.startswith('encoders.')}
    return EncoderWeights(
        find_vit(vit_weights(model, checkpoint.weights, sensor)),
        model.encoder_bands[sensor],
        checkpoint.weights['mask_token'][list(model.encoders).index(key)].float(),
        tuple(sorted(others - {'mask_token', 'sensor_embed'})),
        encoder.patch_embed.grid_size,
        checkpoint.statistics,
    )
