"""Load pretrained weights into a backbone: a geofm checkpoint, or a ViT per sensor."""

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

#: Weights to load: for the whole backbone, or by sensor.
Weights = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str] | Source]


def load_backbone_weights(backbone: MultiSensorViT, weights: Weights) -> None:
    """Load pretrained weights into a backbone, and warn of all changes.

    A geofm checkpoint, or an export of one, is loaded as a whole. Its sensors, fusion and attention
    heads must be those of the model. Other sources are for the ViT of one sensor: DINOv2's own
    files (pretrained ``.pth`` or the teacher of a training run), a timm ViT (``.pth`` or
    ``.safetensors``), TorchGeo's Sentinel ViTs (a file or a name), or the encoder of that sensor in
    a geofm checkpoint. The format is detected from the content. In all cases,

    * kernels of the patch embedding are selected by band name. A band that the source lacks starts
      from the mean of the source's kernels;
    * positions are resampled to the model's grid. A position of CLS or a register is added to that
      token;
    * patches of another size are resampled (FlexiViT, Beyer et al., 2023);
    * a source without LayerScale gets scales of 1, which is equivalent;
    * parameters that the source lacks, e.g. registers, keep their initial values.

    The backbone's ``statistics`` become those of the input in the checkpoint or export, if any.

    Args:
        backbone: The backbone; changed in place.
        weights: A file or a name of weights in TorchGeo; or a mapping from sensor keys to files or
            names. Give ``{path: FILE, bands: [...]}`` to name the source's bands. The single ViT of
            early or joint fusion has the key 'vit'. With joint fusion, the key of a sensor selects
            its patch embedding only. Unnamed bands are guessed from the number of channels: all
            bands of the sensor; B04, B03, B02 for 3 channels; Sentinel-1 for 2; Sentinel-2 for 13.

    Raises:
        CheckpointError: If a file cannot be read, has an unsupported format, or is of a ViT with
            another width, depth or feed-forward layer, or of a geofm model with other sensors or
            another fusion.
        BandError: If the source's bands are unknown.
        ValueError: If the sensor of a ViT is not specified.
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
            f'{weights}: not a checkpoint of geofm, but possibly a ViT of one sensor. Give the '
            f'sensor: weights: {files(backbone)}, or one of them'
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
    # Whole encoders first, so that the patch embedding of a sensor replaces that of a joint ViT.
    for sensor in sorted(weights, key=lambda key: key not in backbone.encoders):
        source = weights[sensor]
        given = source if isinstance(source, Mapping) else Source(path=os.fspath(source))
        if not {'path'} <= set(given) <= {'path', 'bands'}:
            raise ValueError(
                f'weights of {sensor} must be {{path: FILE, bands: [...]}}, not {given}'
            )
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
        _warn(f'no weights were given for {" and ".join(fresh)}: initial values are kept')


def _load_sensor(
    backbone: MultiSensorViT, sensor: str, source: Source, file: ModelFile | None
) -> list[str]:
    found = read_encoder(file or source['path'], sensor)
    bands = source.get('bands', found.bands)
    key = sensor if sensor in backbone.encoders else backbone.encoder_of(sensor)
    # A joint ViT has several patch embeddings; its own key selects all of them.
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
        notes.append('no mask_token in the source')
    else:
        with torch.no_grad():
            backbone.mask_token[list(backbone.encoders).index(key)] = found.mask_token
    if found.left:
        notes.append(f'not used: {", ".join(found.left)}')
    return list(dict.fromkeys(notes))


def _warn(text: str) -> None:
    # Imported here because it takes seconds; training has imported it already.
    from lightning.fabric.utilities import rank_zero_warn

    rank_zero_warn(text, category=UserWarning)
