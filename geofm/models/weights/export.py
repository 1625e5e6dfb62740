"""Export the backbone of a checkpoint to other formats."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from geofm.atomic import check_not_overwritten
from geofm.models.checkpoints.backbones import describe_backbone, load_backbone
from geofm.models.checkpoints.definitions import carry_sensors
from geofm.models.checkpoints.files import METADATA, check_suffix, write_torch, write_weights
from geofm.models.checkpoints.model_file import PREFIX, read_model
from geofm.models.checkpoints.statistics import carry_statistics
from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.hub import export_hub
from geofm.models.weights.layouts import fold_positions, to_dinov2
from geofm.models.weights.one_sensor import vit_weights
from geofm.models.weights.torchgeo import torchgeo_checkpoint
from geofm.sensors import DEFAULT_SENSORS, sensor_channels

#: Export formats.
Format = Literal['geofm', 'timm', 'dinov2', 'torchgeo', 'hub']


class Exported(NamedTuple):
    """Result of an export.

    Attributes:
        path: The file.
        left_out: Names of parts of the backbone that the format cannot store.
    """

    path: Path
    left_out: tuple[str, ...] = ()


def export_backbone(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: Format = 'geofm',
    sensor: str | None = None,
    licence: str | None = None,
    half: bool = False,
) -> Exported:
    """Write a checkpoint's backbone in another format.

    * ``geofm``: the whole backbone with the hyperparameters that rebuild it, for
      :func:`geofm.models.load_backbone`.
    * ``torchgeo``: the same, in the format that ``torchgeo.tasks.Classification`` and
      ``SemanticSegmentation`` load as *weights*.
    * ``timm``: one sensor's ViT for timm's ``VisionTransformer(no_embed_class=True, ...)``. For a
      model with joint fusion, its tokens are those of the model with that sensor alone.
    * ``dinov2``: one sensor's ViT as in DINOv2's own ``dinov2_vit*_pretrain.pth``. Build DINOv2's
      model with ``interpolate_antialias=True`` and ``interpolate_offset=0.0``, which interpolates
      positions as geofm does. With DINOv2's defaults, tokens differ at every image size
      except the one that positions are stored for.
    * ``hub``: a folder in timm's hub format with a model card, for
      ``timm.create_model('local-dir:FOLDER', pretrained=True)`` and
      :func:`geofm.models.load_backbone`.

    The statistics of the input are stored with the weights, except for ``timm`` and ``dinov2`` in
    PyTorch files, which cannot store them.

    Args:
        checkpoint: Lightning checkpoint of a pretraining task, or an export of it.
        output: File to write: ``.safetensors``, or ``.pth``, ``.pt`` or ``.ckpt`` for PyTorch. The
            metadata of safetensors name the channels.
        to: The format.
        sensor: The sensor whose ViT is written, for timm and DINOv2. Default: the only ViT.
        licence: Identifier of the licence that a model card states, for ``hub``.
        half: Whether to write float16 weights, for ``hub``.

    Returns:
        The file, and the parts that were left out.

    Raises:
        CheckpointError: If the checkpoint cannot be read or is of another kind.
        FileExistsError: If the output is the checkpoint.
        ValueError: If the suffix, the format or the sensor is invalid.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if to not in get_args(Format):
        raise ValueError(f'to must be one of {list(get_args(Format))}, not {to!r}')
    if licence is not None and to != 'hub':
        raise ValueError("only the format 'hub' has a model card: leave license out")
    if half and to != 'hub':
        raise ValueError("only the format 'hub' supports float16 weights: leave half out")
    # An export lacks the state that is needed to resume training, so keep the checkpoint.
    check_not_overwritten([checkpoint], [output])
    if to == 'hub':
        if sensor is not None:
            raise ValueError("the format 'hub' is for the whole backbone: leave sensor out")
        return Exported(export_hub(checkpoint, output, licence, half))
    check_suffix(output)
    if to in ('timm', 'dinov2'):
        return _export_encoder(checkpoint, output, to, sensor)
    if sensor is not None:
        raise ValueError(f"the format '{to}' is for the whole backbone: leave sensor out")
    if to == 'torchgeo':
        return Exported(export_torchgeo(checkpoint, output))
    read = read_model(checkpoint).require_pretrained()
    hparams, weights = read.hparams, read.weights
    sensors = describe_backbone(read).sensors
    carried = {**carry_statistics(read.statistics), **carry_sensors(sensors)}
    if output.suffix == '.safetensors':
        return Exported(write_weights(weights, output, {'hyper_parameters': hparams, **carried}))
    state = {PREFIX + key: value for key, value in weights.items()}
    content = {'hyper_parameters': hparams, 'state_dict': state, METADATA: carried}
    return Exported(write_torch(content, output))


def export_torchgeo(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write the file that TorchGeo's tasks load as *weights*.

    ``Classification``, ``SemanticSegmentation`` including ``model='dpt'``, and
    :func:`geofm.models.load_backbone` load the same file.

    Args:
        checkpoint: Lightning checkpoint of a pretraining task, or an export of it.
        output: File to write.

    Returns:
        The file.

    Raises:
        CheckpointError: If the checkpoint cannot be read or is of another kind.
        ValueError: If the file has the suffix of safetensors.
    """
    output = Path(output)
    if output.suffix == '.safetensors':
        raise ValueError(
            f'{output}: TorchGeo reads PyTorch files only: name the file .ckpt or .pth'
        )
    read = read_model(checkpoint).require_pretrained()
    architecture = describe_backbone(read).architecture
    content = torchgeo_checkpoint(read.hparams, read.weights, architecture)
    return write_torch({**content, METADATA: carry_statistics(read.statistics)}, output)


def _export_encoder(
    checkpoint: Path, output: Path, to: Literal['timm', 'dinov2'], sensor: str | None
) -> Exported:
    model = load_backbone(checkpoint)
    if sensor is None and len(model.encoder_bands) == 1:
        (sensor,) = model.encoder_bands
    if sensor is None or sensor not in model.encoder_bands:
        if len(model.encoder_bands) == 1 and len(model.sensors) > 1:
            raise ValueError(
                f'{checkpoint}: one ViT for all sensors, none for {sensor} alone: leave --sensor '
                'out'
            )
        raise ValueError(
            f'{checkpoint}: set the sensor of the ViT with --sensor, one of '
            f'{list(model.encoder_bands)}'
        )
    state = _encoder_state(model, sensor, to)
    bands = list(model.encoder_bands[sensor])
    of_bands = None if model.statistics is None else model.statistics.updated(None, bands)
    added = [key for key in sensor_channels(bands) if key not in DEFAULT_SENSORS]
    said = {'sensor': sensor, 'bands': bands, **carry_statistics(of_bands)}
    if added:
        said |= carry_sensors(added)
    left_out = _left_out(model, sensor, to)
    if output.suffix != '.safetensors' and of_bands is not None and of_bands.differs():
        left_out = (*left_out, 'the statistics of its input (.safetensors can store them)')
    return Exported(write_weights(state, output, said), left_out)


def _encoder_state(
    model: MultiSensorViT, sensor: str, to: Literal['timm', 'dinov2']
) -> dict[str, Tensor]:
    key = model.encoder_of(sensor)
    encoder: Any = model.get_submodule(f'encoders.{key}')
    state = vit_weights(model, model.state_dict(), sensor)
    if to == 'timm':
        return state
    state = fold_positions(state, encoder.patch_embed.grid_size)
    return to_dinov2(state, model.mask_token.detach()[list(model.encoders).index(key)])


def _left_out(model: MultiSensorViT, sensor: str, to: str) -> tuple[str, ...]:
    used = {'encoders', 'sensor_embed'}
    names = {name.split('.')[0] for name, _ in model.named_parameters()} - used
    own = model.encoder_of(sensor)
    others = [f'encoders.{key}' for key in model.encoders if key != own]
    others += [
        name
        for key, name in model.patch_embed_names.items()
        if key != sensor and name.startswith(f'encoders.{own}.')
    ]
    return (*others, *sorted(names - ({'mask_token'} if to == 'dinov2' else set())))
