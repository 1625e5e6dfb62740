"""Networks for export, whose inputs are the raw values of each sensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geofm.models import MultiSensorViT
from geofm.models.checkpoints import carry_sensors, carry_statistics
from geofm.sensors import band_indices, canonical_bands, sensor_channels
from geofm.tasks import FineTuned, logits
from geofm.transforms import NO_STATISTICS, InputStatistics

#: Names of the inputs in addition to the sensors.
PRESENT, DATES = 'present', 'dates'


class RawImage(nn.Module):
    """Module that turns raw values per sensor into the normalised image of a model.

    Args:
        bands: Names of the model's channels, in its order.
        statistics: Statistics for the normalisation. None: the built-in statistics.

    Attributes:
        bands: Names of the channels of each sensor, in canonical order.

    Raises:
        ValueError: If the key of a sensor is the name of another input, 'present' or 'dates'.
    """

    def __init__(self, bands: Sequence[str], statistics: InputStatistics | None) -> None:
        super().__init__()
        ordered = canonical_bands(bands)
        self.bands = {
            key: tuple(ordered[i] for i in channels)
            for key, channels in sensor_channels(ordered).items()
        }
        if taken := {PRESENT, DATES} & self.bands.keys():
            raise ValueError(f'rename the sensor {min(taken)!r}: another input has that name')
        self.normalize = (statistics or NO_STATISTICS).normalize(ordered)
        self.order = band_indices(bands, ordered)

    def forward(self, images: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Normalise and stack the images of all sensors.

        Args:
            images: Raw values of each sensor, (B, C, H, W). A pixel with NaN in any band of any
                present sensor is nodata.
            present: Whether each sensor is present, bool of shape (B, S). None: all are.

        Returns:
            Normalised image of shape (B, C, H, W), 0 where there is no data.
        """
        parts = [images[key] for key in self.bands]
        if present is not None:
            # The values of a missing sensor, e.g. NaN, must not affect the other sensors.
            parts = [
                torch.where(present[:, i, None, None, None], part, 0)
                for i, part in enumerate(parts)
            ]
        image: Tensor = self.normalize({'image': torch.cat(parts, dim=1)})['image']
        return image if self.order == sorted(self.order) else image[:, self.order]


class Network(nn.Module):
    """Network that takes raw values per sensor.

    Args:
        bands: Names of the model's channels, in its order.
        statistics: Statistics for the normalisation. None: the built-in statistics.

    Attributes:
        image: Module that builds the normalised image.
        inputs: Columns of each input: bands of each sensor, and sensors of 'present' and 'dates'.
        outputs: Names of the outputs.
        multiple: Height and width must be multiples of this, in pixels.
        smallest: Smallest height and width, in pixels.
    """

    inputs: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    multiple: int
    smallest: int

    def __init__(self, bands: Sequence[str], statistics: InputStatistics | None) -> None:
        super().__init__()
        self.image = RawImage(bands, statistics)
        self.inputs = dict(self.image.bands)

    def metadata(self) -> dict[str, Any]:
        """Return the description of the network for a file's metadata.

        Returns:
            JSON values: the inputs and outputs, the definitions of the sensors, and mean,
            standard deviation and unit of each band.
        """
        return {
            'inputs': {name: list(columns) for name, columns in self.inputs.items()},
            'outputs': list(self.outputs),
            'multiple': self.multiple,
            'smallest': self.smallest,
            **carry_statistics(InputStatistics.of(self.image.normalize)),
            **carry_sensors(list(self.image.bands)),
        }


class BackboneNetwork(Network):
    """Backbone that takes raw values.

    Its outputs are 'features' (B, D), the result of ``model(x)``, and 'patches' (B, D, H/p, W/p).

    Args:
        model: The backbone, in evaluation mode.
    """

    outputs = ('features', 'patches')

    def __init__(self, model: MultiSensorViT) -> None:
        super().__init__(model.bands, model.statistics)
        self.model = model
        self.multiple = model.patch_size
        # torch.export treats sizes of 1 specially.
        self.smallest = 2 * model.patch_size
        if len(self.image.bands) > 1:
            self.inputs[PRESENT] = tuple(self.image.bands)
        self.inputs[DATES] = model.date_sensors

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute features of raw values.

        Args:
            inputs: Raw values (B, C, H, W) by sensor; 'present' bool (B, S) and 'dates' int64
                (B, T), see :meth:`~geofm.models.MultiSensorViT.forward_features`.

        Returns:
            The outputs by name.
        """
        model, present = self.model, inputs.get(PRESENT)
        image = self.image(inputs, present)
        everywhere = None if present is None else model.of_all_sensors(present)
        tokens = model.forward_features(image, inputs[DATES], present=everywhere)
        grid = (image.shape[-2] // model.patch_size, image.shape[-1] // model.patch_size)
        patches = tokens[:, model.num_prefix_tokens :].mT.unflatten(2, grid)
        return {'features': model.forward_head(tokens), 'patches': patches}

    def metadata(self) -> dict[str, Any]:
        """Return the description of the network, with the name of its model if known."""
        architecture = self.model.architecture
        said = {} if architecture is None else {'model': architecture.model}
        return {**said, **super().metadata()}


class TaskNetwork(Network):
    """Fine-tuned task that takes raw values.

    Its output is 'logits', or 'values' for a regression.

    Args:
        task: The task.
    """

    def __init__(self, task: FineTuned) -> None:
        super().__init__(task.bands, task.statistics)
        self.fine_tuned = task
        self.task = task.task
        self.outputs = ('values' if task.kind == 'regression' else 'logits',)
        self.multiple = task.multiple
        # Decoders halve the grid of patches.
        self.smallest = 4 * task.multiple

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the output of the task for raw values.

        Args:
            inputs: Raw values (B, C, H, W) by sensor.

        Returns:
            The output by name: of shape (B, K, H, W), or (B, K) for a classification.
        """
        output = logits(self.fine_tuned, self.image(inputs))
        if self.fine_tuned.kind == 'classification':
            output = output.flatten(1)
        return {self.outputs[0]: output}

    def metadata(self) -> dict[str, Any]:
        """Return the description of the network, including its classes."""
        task = self.fine_tuned
        said = {'model': task.name, 'kind': task.kind, 'several': task.several}
        return {**said, 'classes': task.legend.entry(), **super().metadata()}
