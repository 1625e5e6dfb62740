"""Load pretrained weights into a backbone: a geofm checkpoint, or a ViT per sensor."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from geofm.models.checkpoints.backbones import check_fit, describe_backbone
from geofm.models.checkpoints.definitions import take_up_sensors_of
from geofm.models.checkpoints.files import METADATA, CheckpointError
from geofm.models.checkpoints.model_file import Checkpoint, ModelFile, read_model
from geofm.models.checkpoints.trust import check_weights
from geofm.models.fusion import SINGLE
from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.fit import load_into
from geofm.models.weights.layouts import find_vit
from geofm.models.weights.one_sensor import vit_weights
from geofm.printing import one_line
from geofm.sensors import BandError
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
    """Return the form in which to give one file per encoder of a model, for error messages.

    Args:
        model: The model.

    Returns:
        A text such as ``{a: FILE, b: FILE}``.
    """
    return '{' + ', '.join(f'{key}: FILE' for key in model.encoder_bands) + '}'


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
