"""Backbones of geofm in torchgeo-bench, which runs probes on the data sets of GEO-Bench.

This module needs the extra ``geofm[bench]``. torchgeo-bench imports :class:`GeofmBench` by its
path, given in ``configs/torchgeo_bench/model/geofm.yaml``.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchgeo.datasets import DependencyNotFoundError

from geofm.models import MultiSensorViT, create_backbone
from geofm.models.checkpoints import build_backbone, read_model
from geofm.sensors import (
    SENSORS,
    SENTINEL1,
    SENTINEL2,
    BandError,
    check_bands,
    check_channels,
    sensor_channels,
)
from geofm.transforms import NO_STATISTICS, InputStatistics

try:
    from torchgeo_bench.datasets.base import BandSpec
    from torchgeo_bench.models.interface import BenchModel
except ImportError as error:
    raise DependencyNotFoundError(
        "torchgeo-bench is not installed. Install it with: pip install 'geofm[bench]'"
    ) from error

logger = logging.getLogger(__name__)

#: Sensors by their names in torchgeo-bench. Only sensors with known units are listed.
_SENSORS = {
    SENTINEL1.name: SENTINEL1,
    'sar': SENTINEL1,
    SENTINEL2.name: SENTINEL2,
}

#: Bands of Sentinel-2 except the cirrus band, which is dark in any unit.
_LIT = tuple(band for band in SENTINEL2.band_names if band != 'B10')

#: Minimum ratio of the mean of B8A to the mean of B07 or B08. With correct band names, the ratio is
#: above 1.
_LEAST_B8A = 0.85


class GeofmBench(BenchModel):
    """A geofm backbone as a model of torchgeo-bench.

    Bands are matched by name. Missing sensors are replaced by the backbone's missing-sensor tokens.
    Missing bands are left out of the patch embedding, as if they had their mean everywhere, and a
    warning is logged. Bands that the backbone does not know are an error.

    With ``dataset.normalization=model_native``, Sentinel-1 is converted to dB and Sentinel-2 to DN,
    and both are normalised as in pretraining. Other strategies are applied by torchgeo-bench.

    Args:
        bands: Channels of the data, as torchgeo-bench describes them.
        checkpoint: Checkpoint of a pretraining task.
        random_weights: Whether only the architecture of the checkpoint is used, as a baseline.
        pool: Features of an image: the CLS token, the mean of the patch tokens, or both
            concatenated.
        names: Band names of geofm by channel names of torchgeo-bench, for channels whose names are
            wrong or unknown. None leaves a channel out.
        normalization: Normalisation strategy of torchgeo-bench.
        _: Further entries of its configuration, which are ignored.

    Attributes:
        model: The backbone.
        levels: Modules for ``eval.segmentation.layers``, ``levels.0`` to ``levels.3``. Their
            outputs are feature maps of shape (B, D, H/p, W/p) after each quarter of the blocks.

    Raises:
        BandError: If the band of a channel is unknown to geofm or to the backbone.
        ValueError: If the statistics of the channels contradict their names or units, or if *pool*
            is invalid.
        CheckpointError: If the checkpoint cannot be read.
    """

    def __init__(
        self,
        bands: list[BandSpec],
        *,
        checkpoint: str,
        random_weights: bool = False,
        pool: Literal['cls', 'mean', 'both'] = 'cls',
        names: Mapping[str, str | None] | None = None,
        normalization: str = 'model_native',
        **_: Any,
    ) -> None:
        native = normalization == 'model_native'
        # torchgeo-bench cannot normalise as in pretraining, because it does not convert to dB.
        super().__init__(bands, 'identity' if native else normalization)
        if pool not in ('cls', 'mean', 'both'):
            raise ValueError(f"pool must be 'cls', 'mean' or 'both', not '{pool}'")
        self.pool = pool
        named = _name_bands(self.bands, names or {})
        _check_names(named)
        self._channels = [self.bands.index(spec) for spec in named.values()]
        self.model = _backbone_for(tuple(named), checkpoint, random_weights).eval()
        statistics = self.model.statistics or NO_STATISTICS
        self.to_native = _ToNative(named, statistics) if native else None
        count = min(4, self.model.depth)
        self._blocks = [(i + 1) * self.model.depth // count - 1 for i in range(count)]
        self.levels = nn.ModuleList(nn.Identity() for _ in self._blocks)

    def normalize_inputs(self, images: Tensor) -> Tensor:
        """Normalise images as in pretraining, or by the strategy of torchgeo-bench.

        Args:
            images: Raw images of shape (B, C, H, W).

        Returns:
            Normalised images of the channels that are used.

        Raises:
            BandError: If the images do not have one channel per described band.
        """
        check_channels(images, [spec.name for spec in self.bands])
        if self.to_native is not None:
            normalised: Tensor = self.to_native(images[:, self._channels])
            return normalised
        return super().normalize_inputs(images)[:, self._channels]

    def _forward_patch_features(self, images: Tensor) -> Tensor:
        """Compute the features of normalised images, (B, D), or (B, 2D) for both kinds."""
        size = self.model.patch_size
        if images.shape[-2] % size or images.shape[-1] % size:
            raise ValueError(
                f'images of {images.shape[-2]} x {images.shape[-1]} px: set dataset.image_size to '
                f'a multiple of {size}'
            )
        tokens, maps = self.model.forward_intermediates(images, self._blocks)
        for level, features in zip(self.levels, maps, strict=True):
            # A segmentation probe reads the maps by forward hooks on these modules.
            level(features)
        features = {
            'cls': tokens[:, 0],
            'mean': tokens[:, self.model.num_prefix_tokens :].mean(dim=1),
        }
        chosen = ('cls', 'mean') if self.pool == 'both' else (self.pool,)
        return torch.cat([features[key] for key in chosen], dim=1)


class _ToNative(nn.Module):
    """Conversion of raw images to dB and DN, and normalisation as in pretraining."""

    scale: Tensor

    def __init__(self, named: Mapping[str, BandSpec], statistics: InputStatistics) -> None:
        super().__init__()
        channels = sensor_channels(tuple(named))
        specs = list(named.values())
        s1 = [specs[i] for i in channels.get(SENTINEL1.name, [])]
        unit = _s1_unit(s1)
        if not unit:
            raise ValueError(
                f'Sentinel-1 with means {[spec.mean for spec in s1]} and minima '
                f'{[spec.min for spec in s1]} is neither dB nor power: leave it out, or choose '
                'another dataset.normalization, e.g. bandspec_zscore'
            )
        self.power = channels[SENTINEL1.name] if s1 and unit == 'power' else []
        self.optical = channels.get(SENTINEL2.name, [])
        scale = torch.ones(len(named))
        if self.optical:
            scale[self.optical] = _dn_factor(named)
        self.register_buffer('scale', scale.view(-1, 1, 1), persistent=False)
        self.normalize = statistics.normalize(tuple(named))

    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale
        if self.power:
            images[:, self.power] = 10 * images[:, self.power].log10()
        valid = torch.ones_like(images[:, 0], dtype=torch.bool)
        if self.optical:
            # Pixels without data are filled with 0.
            valid = (images[:, self.optical] != 0).any(dim=1)
        normalised: Tensor = self.normalize({'image': images, 'valid': valid})['image']
        return normalised


def _name_bands(specs: Sequence[BandSpec], names: Mapping[str, str | None]) -> dict[str, BandSpec]:
    """Return the channels that are used, by the band names of geofm."""
    unknown = [name for name in names if name not in {spec.name for spec in specs}]
    if unknown:
        raise BandError(f'names of {unknown}: the data have {[spec.name for spec in specs]}')
    ours = [
        names[spec.name] if spec.name in names else _find_band(spec.sensor, spec.name)
        for spec in specs
    ]
    if foreign := [
        f'{spec.sensor}/{spec.name}' for spec, name in zip(specs, ours, strict=True) if name == ''
    ]:
        raise BandError(
            f'not known as bands of Sentinel-1 or Sentinel-2: {foreign}. Choose others with '
            'dataset.bands, name them in model.names, or leave them out: model.names.NAME=null'
        )
    used = {name: spec for name, spec in zip(ours, specs, strict=True) if name}
    check_bands([name for name in ours if name])
    return used


def _find_band(sensor: str, name: str) -> str:
    """Return the band name of a channel; an empty string if it is unknown."""
    found = _SENSORS[sensor].find_band(name) if sensor in _SENSORS else None
    return found or ''


def _check_names(named: Mapping[str, BandSpec]) -> None:
    """Raise an error for band names that the statistics contradict."""
    mean = {name: spec.mean for name, spec in named.items()}
    said = {name: spec.name for name, spec in named.items()}
    advice = 'Some data of GEO-Bench have wrong band names; give the right ones in model.names'
    s1 = [spec for name, spec in named.items() if name in SENTINEL1.band_names]
    # Values in an unknown unit cannot be compared.
    if len(s1) == 2 and _s1_unit(s1) and mean['VV'] < mean['VH']:
        raise ValueError(
            f"'{said['VV']}' is darker than '{said['VH']}' (means {mean['VV']:g} and "
            f'{mean["VH"]:g}), so it is probably not co-polarised. {advice}'
        )
    if 'B8A' in mean:
        for band in ('B08', 'B07'):
            # Neighbours in the near infrared, so B8A is about as bright in any data.
            if mean['B8A'] < _LEAST_B8A * mean.get(band, 0):
                raise ValueError(
                    f"'{said['B8A']}' is darker than '{said[band]}' (means {mean['B8A']:g} and "
                    f'{mean[band]:g}), so it is probably not B8A, the neighbour of {band}. {advice}'
                )
    others = {m: name for name, m in mean.items() if name in _LIT}
    if 'B10' in mean and others and mean['B10'] >= min(others):
        darkest = others[min(others)]
        raise ValueError(
            f"'{said['B10']}' is brighter than '{said[darkest]}' (means {mean['B10']:g} and "
            f'{mean[darkest]:g}), so it is probably not the cirrus band B10, the darkest. {advice}'
        )


def _s1_unit(specs: Sequence[BandSpec]) -> Literal['dB', 'power', '']:
    """Recognise the unit of Sentinel-1 by its statistics; empty if it is neither."""
    if all(spec.min < 0 and -60 < spec.mean < -1 for spec in specs):
        return 'dB'
    if all(spec.min >= 0 and 0 < spec.mean < 10 for spec in specs):
        return 'power'
    return ''


def _dn_factor(named: Mapping[str, BandSpec]) -> float:
    """Return the factor that converts Sentinel-2 to DN = reflectance x 10,000."""
    top = {name: spec.max for name, spec in named.items() if name in _LIT}
    if all(value > 1000 for value in top.values()):
        return 1.0
    if all(value <= 10 for value in top.values()):
        return 10_000.0
    raise ValueError(
        f'Sentinel-2 with maxima {top} is neither DN nor reflectance: choose other bands or '
        'another dataset.normalization, e.g. bandspec_zscore'
    )


def _backbone_for(bands: tuple[str, ...], checkpoint: str, random_weights: bool) -> MultiSensorViT:
    """Build the backbone of a checkpoint for the bands of the data."""
    path = Path(checkpoint)
    content = read_model(path).require_pretrained()
    hparams = {**content.hparams, 'in_channels': len(bands), 'bands': bands}
    if random_weights:
        backbone = create_backbone(hparams)
        backbone.statistics = content.statistics
        return backbone
    pretrained = build_backbone(content)
    if unknown := [band for band in bands if band not in pretrained.bands]:
        raise BandError(
            f'{checkpoint} does not know the bands {unknown}, only {list(pretrained.bands)}. Leave '
            'them out with dataset.bands or model.names'
        )
    backbone = create_backbone(hparams)
    backbone.statistics = content.statistics
    weights = pretrained.state_dict()
    at_hand = sensor_channels(bands)
    for key in backbone.sensors:
        if key not in at_hand:
            other = backbone.substitute
            logger.warning('the data have no %s: replaced by %s', key.upper(), other)
            continue
        known = [b for b in SENSORS[key].band_names if b in pretrained.bands]
        if missing := [band for band in known if band not in bands]:
            logger.warning('bands %s are missing: treated as if at their mean', missing)
    for key, wanted in backbone.encoder_bands.items():
        name = f'{backbone.patch_embed_names[key]}.proj.weight'
        kept = [i for i, band in enumerate(pretrained.encoder_bands[key]) if band in wanted]
        weights[name] = weights[name][:, kept]
    backbone.load_state_dict(weights)
    return backbone
