"""Where weights of one sensor's ViT come from: a file, or a name of TorchGeo's."""

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
from geofm.transforms.statistics import InputStatistics


class Source(TypedDict):
    """A file of weights, and the bands that its channels are.

    Attributes:
        path: The file, or a name of TorchGeo's, e.g. ``ViTSmall16_Weights.SENTINEL2_ALL_DINO``.
        bands: Names of its channels, in their order.
    """

    path: str
    bands: NotRequired[list[str]]


class EncoderWeights(NamedTuple):
    """A ViT's weights.

    Attributes:
        tensors: In timm's layout.
        bands: Names of its channels, where they are known.
        mask_token: Token in place of a masked patch, of shape (D,), if it has one.
        left: Names of what else this project's checkpoint holds.
        grid: Patches along each axis for which positions are stored, where it is known.
        statistics: How its input was normalised, where the file says.
    """

    tensors: dict[str, Tensor]
    bands: Sequence[str] | None = None
    mask_token: Tensor | None = None
    left: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    statistics: InputStatistics | None = None


def is_torchgeo(path: str) -> bool:
    """Whether a source is a name of TorchGeo's weights.

    Args:
        path: A file, or such a name.

    Returns:
        True if it reads like one, and there is no such file.
    """
    return bool(re.fullmatch(r'\w+_Weights\.\w+', path)) and not Path(path).exists()


def read_encoder(path: str | ModelFile, sensor: str) -> EncoderWeights:
    """Read the ViT of one sensor.

    Args:
        path: A file, or a name of TorchGeo's.
        sensor: Key of the sensor: of a checkpoint of this project, the encoder to take.

    Returns:
        The weights.

    Raises:
        CheckpointError: If it is neither, cannot be read, or holds no ViT that is known here.
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
        raise CheckpointError('its metadata do not name the bands in a list: damaged')
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
        raise CheckpointError('no such file, and no weights of TorchGeo') from error
    if 'SENTINEL' not in weight.name:
        raise CheckpointError("weights of another sensor: of TorchGeo's, Sentinel-1's and 2's fit")
    state = weight.get_state_dict(progress=True, check_hash=True, weights_only=True)
    return _with_mask_token(find_vit(state), weight.meta['bands'])


def _from_checkpoint(checkpoint: Checkpoint, sensor: str) -> EncoderWeights:
    model = describe_backbone(checkpoint)
    check_fit(model.state_dict(), checkpoint.weights, checkpoint.path)
    if sensor == SINGLE and len(model.encoder_bands) == 1:
        (sensor,) = model.encoder_bands
    if sensor not in model.encoder_bands:
        raise CheckpointError(f'its model has {list(model.encoder_bands)}')
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
