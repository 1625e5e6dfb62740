"""Weights to start from: a checkpoint of this project, or a ViT for each sensor."""

import os
from collections.abc import Mapping

import torch

from geofm.models.checkpoints.backbones import check_fit, describe_backbone
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.checkpoints.model_file import Checkpoint, ModelFile, read_model
from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.fit import load_into
from geofm.models.weights.own import files, fit_backbone
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
        weights: A file or a name of TorchGeo's; or one for each sensor by its key, where a mapping
            ``{path: FILE, bands: [...]}`` names the source's bands. The one ViT of early or joint
            fusion has the key 'vit'; with joint fusion, the key of a sensor stands for its patch
            embedding only. Without names, as many channels as the sensor has are all of its bands,
            3 are B04, B03, B02, 2 are Sentinel-1's and 13 are Sentinel-2's.

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
    file = None if is_torchgeo(os.fspath(weights)) else read_model(weights)
    if file is not None and file.pretrained is not None:
        _load_whole(backbone, file.pretrained)
    elif len(backbone.encoders) == 1:
        _load_by_sensor(backbone, {next(iter(backbone.encoders)): os.fspath(weights)}, file)
    else:
        raise CheckpointError(
            f'{weights}: not a checkpoint of this project, but perhaps a ViT of one sensor. '
            f'Say of which: weights: {files(backbone)}, or one of them'
        )


def _load_whole(backbone: MultiSensorViT, checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    source = describe_backbone(checkpoint)
    check_fit(source.state_dict(), checkpoint.weights, path)
    try:
        notes = fit_backbone(backbone, source, checkpoint.weights)
    except (CheckpointError, BandError) as error:
        raise type(error)(f'{path}: {error}') from error
    if notes:
        _warn(f'{path}: fitted to the model: {"; ".join(notes)}')
    backbone.statistics = checkpoint.statistics


def _load_by_sensor(
    backbone: MultiSensorViT,
    weights: Mapping[str, str | os.PathLike[str] | Source],
    file: ModelFile | None = None,
) -> None:
    known = list(dict.fromkeys([*backbone.encoders, *backbone.encoder_bands]))
    if unknown := sorted(set(weights) - set(known)):
        raise ValueError(f'weights for {unknown}, but the model has {known}')
    # Encoders first, so that the patch embedding of a sensor replaces that of a joint ViT.
    for sensor in sorted(weights, key=lambda key: key not in backbone.encoders):
        source = weights[sensor]
        given = source if isinstance(source, Mapping) else Source(path=os.fspath(source))
        if not {'path'} <= set(given) <= {'path', 'bands'}:
            raise ValueError(f'weights of {sensor}: {{path: FILE, bands: [...]}}, not {given}')
        try:
            notes = _load_sensor(backbone, sensor, given, file)
        except (CheckpointError, BandError) as error:
            text = str(error).removeprefix(f'{given["path"]}: ')
            raise type(error)(f'{given["path"]}: {text}') from error
        if notes:
            _warn(f'{given["path"]} into the encoder of {sensor}: {"; ".join(notes)}')
    fresh = [f'the encoder of {key}' for key in backbone.encoders if key not in weights]
    if backbone.fusion is not None:
        fresh.append('the fusion')
    if fresh:
        _warn(f'no weights were given for {" and ".join(fresh)}: fresh values')


def _load_sensor(
    backbone: MultiSensorViT, sensor: str, source: Source, file: ModelFile | None
) -> list[str]:
    found = read_encoder(file or source['path'], sensor)
    bands = source.get('bands', found.bands)
    key = sensor if sensor in backbone.encoders else backbone.encoder_of(sensor)
    # A joint ViT has several patch embeddings, and its own key stands for all.
    names = {k: n for k, n in backbone.patch_embed_names.items() if k == sensor} or {
        k: n for k, n in backbone.patch_embed_names.items() if backbone.encoder_of(k) == sensor
    }
    notes: list[str] = []
    for part, name in names.items():
        notes += load_into(
            backbone.get_submodule(f'encoders.{key}'),  # type: ignore[arg-type]
            found.tensors,
            backbone.encoder_bands[part],
            bands,
            found.grid,
            into=name.removeprefix(f'encoders.{key}.'),
            rest=sensor == key,
        )
    wanted = [band for part in names for band in backbone.encoder_bands[part]]
    if found.statistics is not None:
        backbone.statistics = found.statistics.updated(backbone.statistics, wanted)
    if sensor != key:
        return list(dict.fromkeys(notes))
    if found.mask_token is None:
        notes.append('no mask_token there')
    else:
        with torch.no_grad():
            backbone.mask_token[list(backbone.encoders).index(key)] = found.mask_token
    if found.left:
        notes.append(f'not used: {", ".join(found.left)}')
    return list(dict.fromkeys(notes))


def _warn(text: str) -> None:
    # Its import takes seconds, and who trains has paid them already.
    from lightning.fabric.utilities import rank_zero_warn

    rank_zero_warn(text, category=UserWarning)
