"""Fit a ViT's weights to an encoder: bands by name, positions, patch size."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from geofm.models.checkpoints.files import CheckpointError
from geofm.models.weights.layouts import architecture, fold_positions
from geofm.printing import one_line
from geofm.sensors import (
    DEFAULT_SENSORS,
    RGB_BANDS,
    SENSORS,
    BandError,
    check_bands,
    sensor_channels,
)

_PATCH_EMBED = 'patch_embed.proj.weight'


def load_into(
    encoder: VisionTransformer,
    tensors: Mapping[str, Tensor],
    wanted: Sequence[str],
    bands: Sequence[str] | None,
    source_grid: tuple[int, int] | None = None,
    *,
    into: str = 'patch_embed',
    rest: bool = True,
) -> list[str]:
    """Load a ViT's weights into an encoder, and report all changes.

    Args:
        encoder: The encoder; changed in place.
        tensors: Weights in timm's layout, see :func:`~geofm.models.weights.layouts.find_vit`.
        wanted: Names of the encoder's channels.
        bands: Names of the source's channels. None: guess from the number of channels.
        source_grid: Grid of the source's positions, if known.
        into: Name of the patch embedding in the encoder, which may have one per sensor.
        rest: Whether to load the other weights of the ViT as well.

    Returns:
        A note for each change, and for weights that are unused or missing.

    Raises:
        BandError: If the source's bands are unknown, or their number is not that of its channels.
        CheckpointError: If the weights do not fit.
    """
    own = encoder.state_dict()
    theirs, ours = architecture(tensors), architecture(own)
    if theirs != ours:
        raise CheckpointError(
            f'its ViT has {theirs}, but the encoder has {ours}. '
            'Use a model of that size (ffn_layer in model_args selects MLP or SwiGLU)'
        )
    others = {k for k in own if k.startswith('patch_embed.') and not k.startswith(f'{into}.')}
    grid = encoder.patch_embed.grid_size
    tensors = fold_positions(tensors, grid, source_grid)
    notes = [
        *_fit_patch_embed(tensors, wanted, bands, encoder.patch_embed.patch_size),
        *_fit_positions(tensors, grid),
        *_fit_layer_scale(tensors, own),
    ]
    if 'reg_token' in tensors and 'reg_token' in own:
        theirs_registers, ours_registers = tensors['reg_token'].shape[1], own['reg_token'].shape[1]
        if theirs_registers != ours_registers:
            del tensors['reg_token']
            notes.append(f'registers not used: {theirs_registers} instead of {ours_registers}')
    tensors = {re.sub(r'^patch_embed\.', f'{into}.', k): v for k, v in tensors.items()}
    fitting = {
        key: value
        for key, value in tensors.items()
        if key in own and (rest or key.startswith(f'{into}.'))
    }
    try:
        encoder.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f'its weights do not fit: {one_line(error)}') from error
    if not rest:
        return [*notes, 'only the patch embedding is used']
    new = own.keys() - fitting - others
    for title, left in (('not in the source', new), ('not used', tensors.keys() - own)):
        if left:
            notes.append(f'{title}: {", ".join(_short(left))}')
    return notes


def _known_bands(wanted: Sequence[str], channels: int) -> tuple[str, ...] | None:
    """Guess the bands of a ViT from the number of its channels.

    The candidates are all bands of a sensor among the wanted bands; red, green and blue; and all
    bands of a default sensor.
    """
    keys = [*sensor_channels(wanted), *DEFAULT_SENSORS]
    of_sensors = [SENSORS[key].band_names for key in keys]
    count = len(keys) - len(DEFAULT_SENSORS)
    choices = [*of_sensors[:count], RGB_BANDS, *of_sensors[count:]]
    return next((bands for bands in choices if len(bands) == channels), None)


def _source_bands(
    bands: Sequence[str] | None, wanted: Sequence[str], channels: int
) -> tuple[tuple[str, ...], list[str]]:
    notes = []
    if bands is None:
        bands = _known_bands(wanted, channels)
        if bands is None:
            raise BandError(
                f'the bands of its {channels} channels are unknown: name them with '
                '{path: FILE, bands: [B04, B03, B02]}'
            )
        notes.append(f'its channels are assumed to be {", ".join(bands)}')
    bands = check_bands([_band_name(band) for band in bands])
    if len(bands) != channels:
        raise BandError(f'{len(bands)} bands are given for its {channels} channels: {list(bands)}')
    return bands, notes


def _band_name(band: str) -> str:
    """Convert TorchGeo's names of bands, e.g. B1 and B8a, to geofm's."""
    return re.sub(r'^B(\d)$', r'B0\1', 'B8A' if band == 'B8a' else band)


def _fit_patch_embed(
    tensors: dict[str, Tensor],
    wanted: Sequence[str],
    bands: Sequence[str] | None,
    patch_size: tuple[int, int],
) -> list[str]:
    """Select kernels by band name; a band that the source lacks gets the mean kernel."""
    kernels = tensors[_PATCH_EMBED]
    bands, notes = _source_bands(bands, wanted, kernels.shape[1])
    if tuple(kernels.shape[-2:]) != tuple(patch_size):
        notes.append(f'patches resampled from {_by(kernels.shape[-2:])} to {_by(patch_size)} px')
        kernels = resample_patch_embed(kernels, list(patch_size))
    mean = kernels.mean(dim=1)
    tensors[_PATCH_EMBED] = torch.stack(
        [kernels[:, bands.index(band)] if band in bands else mean for band in wanted], dim=1
    )
    if lacking := [band for band in wanted if band not in bands]:
        notes.append(f'{", ".join(lacking)} start from the mean of the kernels')
    if unused := [band for band in bands if band not in wanted]:
        notes.append(f'kernels of {", ".join(unused)} not used')
    return notes


def _fit_positions(tensors: dict[str, Tensor], grid: tuple[int, int]) -> list[str]:
    if 'pos_embed' not in tensors:
        return []
    positions = tensors['pos_embed']
    old = tuple(positions.shape[1:3])
    tensors['pos_embed'] = resample_abs_pos_embed(
        positions.flatten(1, 2), new_size=list(grid), old_size=list(old), num_prefix_tokens=0
    )
    return [] if old == tuple(grid) else [f'positions resampled from {_by(old)} to {_by(grid)}']


def _fit_layer_scale(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Set scales of 1 for a ViT without LayerScale, which is equivalent."""
    ours = {key for key in own if re.search(r'\.ls[12]\.gamma$', key)}
    theirs = {key for key in tensors if re.search(r'\.ls[12]\.gamma$', key)}
    if theirs and not ours:
        raise CheckpointError('its ViT has LayerScale: set init_values in model_args')
    if not ours or theirs:
        return []
    tensors.update({key: torch.ones_like(own[key]) for key in ours})
    return ['no LayerScale in the source: scales are 1']


def _by(size: Sequence[Any]) -> str:
    return ' x '.join(str(side) for side in size)


def _short(names: set[str]) -> list[str]:
    """Shorten names of weights, with one entry for all blocks."""
    return sorted({re.sub(r'^blocks\.\d+\.', 'blocks.*.', name) for name in names})
