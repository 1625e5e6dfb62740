"""Weights to start from: a checkpoint of this project, or a ViT for each sensor."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from geofm.models.checkpoints import Checkpoint, as_checkpoint, check_fit, describe_backbone
from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.files import CheckpointError, read_file
from geofm.models.weights.fit import load_into
from geofm.models.weights.own import fit_backbone
from geofm.models.weights.sources import Source, is_torchgeo, read_encoder
from geofm.sensors import BandError

#: Weights to start from: of the whole backbone, or by sensor.
Weights = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str] | Source]


def load_backbone_weights(backbone: MultiSensorViT, weights: Weights) -> None:
    """Load pretrained weights into a backbone, and warn of all that was not taken as it was.

    A checkpoint of this project, or an export of one, is loaded whole: its sensors, fusion and
    attention heads must be those of the model. Any other source is one sensor's ViT: DINOv2's own
    files, pretrained ``.pth`` or a training run's teacher; a timm ViT, ``.pth`` or
    ``.safetensors``; TorchGeo's Sentinel ViTs, as a file or by name; or, named for a sensor, that
    sensor's encoder in a checkpoint of this project. Files are told apart by their content. Then,
    for all of them,

    * kernels of the patch embedding are taken by band name. A band that the source lacks starts
      from the mean of the source's kernels;
    * positions are resampled to the model's grid; a position of CLS or of a register is added to
      that token;
    * patches of another size are resampled (FlexiViT, Beyer et al., 2023);
    * a source without LayerScale gets scales of 1, which change nothing;
    * what the source lacks, registers for example, keeps its fresh values.

    The statistics of the input that a checkpoint or an export carries become the backbone's
    ``statistics``.

    Args:
        backbone: The backbone; changed in place.
        weights: A file or a name of TorchGeo's; or one for each sensor by its key, 'vit' for the
            one ViT of early fusion, where a mapping ``{path: FILE, bands: [...]}`` names the
            source's bands. Without names, 3 channels are B04, B03, B02, 2 are Sentinel-1's and 13
            are Sentinel-2's.

    Raises:
        CheckpointError: If a file cannot be read, is of no kind that is known here, or is of a
            ViT of another width, depth or feed-forward layer, or of a model of this project with
            other sensors or another fusion.
        BandError: If the source's bands are not known.
        ValueError: If it is not said which sensor a ViT is for.
    """
    if isinstance(weights, Mapping):
        _load_by_sensor(backbone, weights)
        return
    path = Path(weights)
    checkpoint = None if is_torchgeo(os.fspath(weights)) else as_checkpoint(read_file(path), path)
    if checkpoint is not None:
        _load_whole(backbone, checkpoint, path)
    elif len(backbone.encoders) == 1:
        _load_by_sensor(backbone, {next(iter(backbone.encoders)): os.fspath(weights)})
    else:
        raise CheckpointError(
            f'{weights}: not a checkpoint of this project, but perhaps a ViT of one sensor. '
            'Say of which: weights: {s1: FILE, s2: FILE}, or one of them'
        )


def _load_whole(backbone: MultiSensorViT, checkpoint: Checkpoint, path: Path) -> None:
    source = describe_backbone(checkpoint, path)
    check_fit(source.state_dict(), checkpoint.weights, path)
    try:
        notes = fit_backbone(backbone, source, checkpoint.weights)
    except (CheckpointError, BandError) as error:
        raise type(error)(f'{path}: {error}') from error
    if notes:
        _warn(f'{path}: fitted to the model: {"; ".join(notes)}')
    backbone.statistics = checkpoint.statistics


def _load_by_sensor(
    backbone: MultiSensorViT, weights: Mapping[str, str | os.PathLike[str] | Source]
) -> None:
    if unknown := sorted(set(weights) - set(backbone.encoders)):
        raise ValueError(f'weights for {unknown}, but the model has {list(backbone.encoders)}')
    for sensor, source in weights.items():
        given = source if isinstance(source, Mapping) else Source(path=os.fspath(source))
        if not {'path'} <= set(given) <= {'path', 'bands'}:
            raise ValueError(f'weights of {sensor}: {{path: FILE, bands: [...]}}, not {given}')
        try:
            notes = _load_sensor(backbone, sensor, given)
        except (CheckpointError, BandError) as error:
            text = str(error).removeprefix(f'{given["path"]}: ')
            raise type(error)(f'{given["path"]}: {text}') from error
        if notes:
            _warn(f'{given["path"]} into the encoder of {sensor}: {"; ".join(notes)}')
    fresh = [f'the encoder of {sensor}' for sensor in backbone.encoders if sensor not in weights]
    if backbone.fusion is not None:
        fresh.append('the fusion')
    if fresh:
        _warn(f'no weights were given for {" and ".join(fresh)}: fresh values')


def _load_sensor(backbone: MultiSensorViT, sensor: str, source: Source) -> list[str]:
    found = read_encoder(source['path'], sensor)
    notes = load_into(
        backbone.get_submodule(f'encoders.{sensor}'),  # type: ignore[arg-type]
        found.tensors,
        backbone.encoder_bands[sensor],
        source.get('bands', found.bands),
        found.grid,
    )
    if found.statistics is not None:
        backbone.statistics = found.statistics.updated(
            backbone.statistics, backbone.encoder_bands[sensor]
        )
    if found.mask_token is None:
        notes.append('no mask_token there')
    else:
        with torch.no_grad():
            backbone.mask_token[list(backbone.encoders).index(sensor)] = found.mask_token
    if found.left:
        notes.append(f'not used: {", ".join(found.left)}')
    return notes


def _warn(text: str) -> None:
    # Its import takes seconds, and who trains has paid them already.
    from lightning.fabric.utilities import rank_zero_warn

    rank_zero_warn(text, category=UserWarning)
