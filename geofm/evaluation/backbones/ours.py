"""Backbones of geofm, built for the bands of the data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

from geofm.evaluation.backbones.adapter import absent_sensors
from geofm.models import (
    MODEL_NAMES,
    VARIANTS,
    CheckpointError,
    MultiSensorViT,
    create_backbone,
    load_model,
)
from geofm.models.checkpoints import ModelFile, read_model, released
from geofm.sensors import SENSORS, BandError, sensor_of
from geofm.transforms import InputStatistics


def is_ours(model: str) -> bool:
    """Return whether a name is that of a geofm model, a file, or weights of the package.

    Args:
        model: Name of a model or of released weights, or a file.

    Returns:
        Whether it is one of these.
    """
    is_file = Path(model).suffix == '.ckpt' or Path(model).is_file()
    return is_file or model in MODEL_NAMES or model in released()


class OursBuilder:
    """Builder of a geofm backbone.

    Attributes:
        name: Name of the model.
        title: Name in tables.
        architecture: Description that is equal for models that differ only in their weights.
        learned: Whether there are weights to load.
        statistics: How the input of the weights was normalised; None if their file does not say.
    """

    def __init__(
        self,
        model: str,
        weights: Path | ModelFile | None,
        bands: Sequence[str] | None,
        model_args: Mapping[str, Any],
    ) -> None:
        """Initialize a new OursBuilder instance.

        Args:
            model: Name of a model, or the path of a checkpoint.
            weights: The checkpoint. None: random weights.
            bands: Bands of the model. Default: the bands of the checkpoint or of the architecture.
            model_args: Further arguments of the model.

        Raises:
            CheckpointError: If the checkpoint cannot be read.
            BandError: If the bands are not the bands of the checkpoint.
        """
        self._bands = tuple(bands) if bands else None
        self._args = dict(model_args)
        self.learned = weights is not None
        self.name = model
        self.title = model
        self._loaded: MultiSensorViT | None = None
        self._hparams: dict[str, Any] = {}
        self.statistics: InputStatistics | None = None
        if weights is not None:
            file = read_model(weights)
            self.title = file.path.stem
            self._load(file, model if model in MODEL_NAMES else None)
        self.architecture = (
            f'{self.name} {self._hparams} {self._bands} {sorted(self._args.items())} '
            f'{self.statistics}'
        )

    def build(self, data_bands: Sequence[str], random: bool) -> tuple[MultiSensorViT, list[str]]:
        """Build the backbone.

        Sensors for which the data have no bands are replaced by the model's missing-sensor tokens.

        Args:
            data_bands: Bands of the data.
            random: Whether the weights are left random.

        Returns:
            The backbone in evaluation mode, and notes for the report.

        Raises:
            BandError: If the data have none of the model's sensors.
        """
        every = self._every_band(data_bands)
        absent = absent_sensors(data_bands, every)
        bands = tuple(band for band in every if sensor_of(band).name not in absent)
        if not bands:
            raise BandError(
                f'{self.title}: a model of {list(absent)}, but the data have {list(data_bands)}'
            )
        left = [band for band in self._default_bands() if band not in every]
        model = self._create(bands)
        lines = [
            f'{self.title}: {key} is not in the data: replaced by {model.substitute}'
            for key in absent
        ]
        if self._loaded is None and left:
            lines.append(f'{self.title}: built without {left}, which the data lack')
        if self._loaded is not None and not random:
            # The patch embedding of a missing sensor has other channels here, and is not used.
            names = model.patch_embed_names
            unused = tuple(f'{names[key]}.' for key in absent if key in names)
            weights = {
                key: value
                for key, value in self._loaded.state_dict().items()
                if not key.startswith(unused)
            }
            try:
                missing, unexpected = model.load_state_dict(weights, strict=False)
            except RuntimeError as error:
                raise CheckpointError(f'{self.title}: its weights do not fit: {error}') from error
            if unexpected or any(not key.startswith(unused) for key in missing):
                raise CheckpointError(
                    f'{self.title}: its weights do not fit: {missing}, {unexpected}'
                )
        return model.eval(), lines

    def _load(self, file: ModelFile, name: str | None) -> None:
        """Load a checkpoint of a pretraining task or a TorchGeo task, or a file of weights."""
        loaded: Any = load_model(file, name, self._bands, self._args if name else None)
        if name is None:
            if (own := file.pretrained) is not None:
                self._hparams, self.name = own.hparams, own.hparams['model']
            elif (found := file.task) is not None:
                self.name, self._args = found.model, {**found.model_args, **self._args}
        if not isinstance(loaded, MultiSensorViT):
            raise CheckpointError(
                f'{file.path}: a model of timm: give its name as model, and the file as weights'
            )
        if self._bands not in (None, loaded.bands):
            raise BandError(
                f'{file.path}: has bands {list(loaded.bands)}, not {list(self._bands or ())}'
            )
        self._loaded, self._bands = loaded, loaded.bands
        self.statistics = loaded.statistics

    def _default_bands(self) -> tuple[str, ...]:
        if self._bands is not None:
            return self._bands
        return tuple(
            band
            for key in VARIANTS[self.name.rsplit('_', 1)[1]]['sensors']
            for band in SENSORS[key].band_names
        )

    def _every_band(self, data_bands: Sequence[str]) -> tuple[str, ...]:
        """Return the bands of the model. With random weights, it is built for those of the data."""
        bands = self._default_bands()
        if self._loaded is not None or self._bands is not None:
            return bands
        absent = absent_sensors(data_bands, bands)
        return tuple(b for b in bands if b in data_bands or sensor_of(b).name in absent)

    def _create(self, bands: Sequence[str]) -> MultiSensorViT:
        if self._hparams:
            hparams = {**self._hparams, 'bands': list(bands), 'in_channels': len(bands)}
            return create_backbone(hparams)
        model: Any = timm.create_model(
            self.name, in_chans=len(bands), bands=list(bands), num_classes=0, **self._args
        )
        return model
