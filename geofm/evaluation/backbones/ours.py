"""Backbones of this project, for whatever bands the data have."""

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
from geofm.models.checkpoints import read_model
from geofm.sensors import SENSORS, BandError, sensor_of
from geofm.transforms import InputStatistics


def is_ours(model: str, weights: Path | None = None) -> bool:
    """Whether a name is that of a geofm model, or of a file.

    Args:
        model: The name.
        weights: File of weights that goes with it.

    Returns:
        True if it is.
    """
    return model in MODEL_NAMES or Path(model).suffix == '.ckpt' or Path(model).is_file()


class OursBuilder:
    """Builds a backbone of this project.

    Attributes:
        name: Name of the model.
        title: What a table calls it.
        architecture: Same for models that differ in their weights alone.
        learned: Whether there are weights to load.
        statistics: How the input of the weights was normalised, where their file says.
    """

    def __init__(
        self,
        model: str,
        weights: Path | None,
        bands: Sequence[str] | None,
        model_args: Mapping[str, Any],
    ) -> None:
        """Initialize a new OursBuilder instance.

        Args:
            model: Name of a model, or a checkpoint.
            weights: A checkpoint for the name.
            bands: Bands of the model, by default its own.
            model_args: Further arguments of the model.

        Raises:
            CheckpointError: If the checkpoint cannot be read.
            BandError: If a checkpoint is given bands that are not its own.
        """
        self._bands = tuple(bands) if bands else None
        self._args = dict(model_args)
        path = weights if model in MODEL_NAMES else Path(model)
        self.learned = path is not None
        self.name = model
        self.title = model
        self._loaded: MultiSensorViT | None = None
        self._hparams: dict[str, Any] = {}
        self.statistics: InputStatistics | None = None
        if path is not None:
            self.title = path.stem
            self._load(path, model if model in MODEL_NAMES else None)
        self.architecture = (
            f'{self.name} {self._hparams} {self._bands} {sorted(self._args.items())} '
            f'{self.statistics}'
        )

    def build(self, data_bands: Sequence[str], random: bool) -> tuple[MultiSensorViT, list[str]]:
        """Build the backbone.

        A sensor of which the data have no band at all is left to the model's missing-sensor tokens.

        Args:
            data_bands: Bands of the data.
            random: Leave the weights random.

        Returns:
            The backbone in evaluation mode, and what a reader should know.

        Raises:
            BandError: If the data have none of its sensors.
        """
        every = self._every_band(data_bands)
        absent = absent_sensors(data_bands, every)
        bands = tuple(band for band in every if sensor_of(band).name not in absent)
        if not bands:
            raise BandError(
                f'{self.title}: a model of {list(absent)}, and the data have {list(data_bands)}'
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
            # Its patch embedding is made for all bands of an absent sensor, and is never used.
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

    def _load(self, path: Path, name: str | None) -> None:
        """Read a checkpoint: of this project's task, of TorchGeo's, or a file of weights."""
        file = read_model(path)
        loaded: Any = load_model(file, name, self._bands, self._args if name else None)
        if name is None:
            if (own := file.pretrained) is not None:
                self._hparams, self.name = own.hparams, own.hparams['model']
            elif (found := file.task) is not None:
                self.name, self._args = found.model, {**found.model_args, **self._args}
        if not isinstance(loaded, MultiSensorViT):
            raise CheckpointError(
                f'{path}: a model of timm: give its name as model, and the file as weights'
            )
        if self._bands not in (None, loaded.bands):
            raise BandError(
                f'{path}: has bands {list(loaded.bands)}, not {list(self._bands or ())}'
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
        """Bands of the model; one with random weights is made for what the data have."""
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
