"""Our backbones in torchgeo-bench: its k-NN, linear and segmentation probes over GEO-Bench.

Needs the extra ``geofm[bench]``. torchgeo-bench builds :class:`GeofmBench` by its path, from
``configs/torchgeo_bench/model/geofm.yaml``.
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

#: Sensors by what torchgeo-bench calls them. Their units there are known.
_SENSORS = {
    SENTINEL1.name: SENTINEL1,
    'sar': SENTINEL1,
    SENTINEL2.name: SENTINEL2,
}

#: Bands of Sentinel-2 but the cirrus band, which is dark in any unit.
_LIT = tuple(band for band in SENTINEL2.band_names if band != 'B10')

#: Least mean of B8A as a fraction of that of B07 or B08; in data with the right names it is above
#: 1.
_LEAST_B8A = 0.85


class GeofmBench(BenchModel):
    """A backbone of this project as a model of torchgeo-bench.

    Bands are matched by name. A sensor that the data lack is replaced by the backbone's
    missing-sensor tokens; a band that the data lack is left out of the patch embedding, as if it
    were at its mean everywhere, and a warning says so. A band that the backbone does not know is
    an error.

    With ``dataset.normalization=model_native`` Sentinel-1 is brought to dB, Sentinel-2 to DN, and
    both are normalised as in pretraining; any other strategy is torchgeo-bench's own.

    Args:
        bands: Channels of the data, as torchgeo-bench describes them.
        checkpoint: Checkpoint of :class:`geofm.tasks.DINOv2`.
        random_weights: Take the architecture of the checkpoint alone: the baseline.
        pool: Features of an image: the CLS token, the mean of the patches, or both side by side.
        names: Our names of channels by torchgeo-bench's, where those are wrong or unknown; None
            leaves a channel out.
        normalization: Strategy by which torchgeo-bench normalises.
        _: What else stands in its configuration.

    Attributes:
        model: The backbone.
        levels: What to name as ``eval.segmentation.layers``, ``levels.0`` to ``levels.3``: maps of
            shape (B, D, H/p, W/p) after each quarter of the blocks.

    Raises:
        BandError: If a channel has no name of ours, or the backbone does not know it.
        ValueError: If the statistics of the channels contradict their names or units, or *pool* is
            none of these.
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
        # What is native to us torchgeo-bench cannot work out: it knows no decibels.
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
        """Normalise images as in pretraining, or as torchgeo-bench is told to.

        Args:
            images: As they come, of shape (B, C, H, W).

        Returns:
            Images of the channels that are used.

        Raises:
            BandError: If the images do not have one channel for each of the bands described.
        """
        check_channels(images, [spec.name for spec in self.bands])
        if self.to_native is not None:
            normalised: Tensor = self.to_native(images[:, self._channels])
            return normalised
        return super().normalize_inputs(images)[:, self._channels]

    def _forward_patch_features(self, images: Tensor) -> Tensor:
        """Features of shape (B, D), or (B, 2D) of both kinds, of normalised images."""
        size = self.model.patch_size
        if images.shape[-2] % size or images.shape[-1] % size:
            raise ValueError(
                f'images of {images.shape[-2]} x {images.shape[-1]} px: set dataset.image_size to '
                f'a multiple of {size}'
            )
        tokens, maps = self.model.forward_intermediates(images, self._blocks)
        for level, features in zip(self.levels, maps, strict=True):
            # Seen by the hooks of a segmentation probe.
            level(features)
        features = {
            'cls': tokens[:, 0],
            'mean': tokens[:, self.model.num_prefix_tokens :].mean(dim=1),
        }
        chosen = ('cls', 'mean') if self.pool == 'both' else (self.pool,)
        return torch.cat([features[key] for key in chosen], dim=1)


class _ToNative(nn.Module):
    """From what the data hold to dB, DN and then what the backbone was pretrained on."""

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
            # How gaps are filled.
            valid = (images[:, self.optical] != 0).any(dim=1)
        normalised: Tensor = self.normalize({'image': images, 'valid': valid})['image']
        return normalised


def _name_bands(specs: Sequence[BandSpec], names: Mapping[str, str | None]) -> dict[str, BandSpec]:
    """Channels that are used, by our name."""
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
            f'no Sentinel-1 or Sentinel-2 bands known to us: {foreign}. Choose others with '
            'dataset.bands, name them in model.names, or leave them out: model.names.NAME=null'
        )
    used = {name: spec for name, spec in zip(ours, specs, strict=True) if name}
    check_bands([name for name in ours if name])
    return used


def _find_band(sensor: str, name: str) -> str:
    """Our name of a channel; empty if there is none."""
    found = _SENSORS[sensor].find_band(name) if sensor in _SENSORS else None
    return found or ''


def _check_names(named: Mapping[str, BandSpec]) -> None:
    """Refuse names that the statistics contradict."""
    mean = {name: spec.mean for name, spec in named.items()}
    said = {name: spec.name for name, spec in named.items()}
    advice = 'Some data of GEO-Bench have wrong names; say the right ones in model.names'
    s1 = [spec for name, spec in named.items() if name in SENTINEL1.band_names]
    # Of values without a unit it cannot be said.
    if len(s1) == 2 and _s1_unit(s1) and mean['VV'] < mean['VH']:
        raise ValueError(
            f"'{said['VV']}' is darker than '{said['VH']}' (means {mean['VV']:g} and "
            f'{mean["VH"]:g}), so it is hardly co-polarised. {advice}'
        )
    if 'B8A' in mean:
        for band in ('B08', 'B07'):
            # Beside each other in the near infrared: in any data B8A is about as bright.
            if mean['B8A'] < _LEAST_B8A * mean.get(band, 0):
                raise ValueError(
                    f"'{said['B8A']}' is darker than '{said[band]}' (means {mean['B8A']:g} and "
                    f'{mean[band]:g}), so it is hardly B8A, which lies beside {band}. {advice}'
                )
    others = {m: name for name, m in mean.items() if name in _LIT}
    if 'B10' in mean and others and mean['B10'] >= min(others):
        darkest = others[min(others)]
        raise ValueError(
            f"'{said['B10']}' is brighter than '{said[darkest]}' (means {mean['B10']:g} and "
            f'{mean[darkest]:g}), so it is hardly the cirrus band B10, the darkest. {advice}'
        )


def _s1_unit(specs: Sequence[BandSpec]) -> Literal['dB', 'power', '']:
    """Unit of Sentinel-1, by its statistics; none if they are of neither."""
    if all(spec.min < 0 and -60 < spec.mean < -1 for spec in specs):
        return 'dB'
    if all(spec.min >= 0 and 0 < spec.mean < 10 for spec in specs):
        return 'power'
    return ''


def _dn_factor(named: Mapping[str, BandSpec]) -> float:
    """What brings Sentinel-2 to DN = reflectance x 10,000."""
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
    """The backbone of a checkpoint, for the bands at hand."""
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
            f'{checkpoint} knows no bands {unknown}, but {list(pretrained.bands)}. Leave them out '
            'with dataset.bands or model.names'
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
            logger.warning('bands %s are missing: they count as at their mean', missing)
    for key, wanted in backbone.encoder_bands.items():
        name = f'{backbone.patch_embed_names[key]}.proj.weight'
        kept = [i for i, band in enumerate(pretrained.encoder_bands[key]) if band in wanted]
        weights[name] = weights[name][:, kept]
    backbone.load_state_dict(weights)
    return backbone
