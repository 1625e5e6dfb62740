"""Networks on raw values by sensor: what a deployed file computes, and what its inputs are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geofm.models import MultiSensorViT
from geofm.models.checkpoints.definitions import carry_sensors
from geofm.models.checkpoints.statistics import carry_statistics
from geofm.sensors import band_indices, canonical_bands, sensor_channels
from geofm.tasks.fine_tuned import FineTuned, logits
from geofm.transforms.statistics import NO_STATISTICS, InputStatistics

#: Inputs beside the sensors.
PRESENT, DATES = 'present', 'dates'


class RawImage(nn.Module):
    """The normalised image that a model expects, of raw values by sensor.

    Args:
        bands: Names of the channels that the model expects, in its order.
        statistics: How they are normalised; None: by the built-in statistics.

    Attributes:
        bands: Names of the channels of each sensor, in canonical order.

    Raises:
        ValueError: If a sensor has the name of another input.
    """

    def __init__(self, bands: Sequence[str], statistics: InputStatistics | None) -> None:
        super().__init__()
        ordered = canonical_bands(bands)
        self.bands = {
            key: tuple(ordered[i] for i in channels)
            for key, channels in sensor_channels(ordered).items()
        }
        if taken := {PRESENT, DATES} & self.bands.keys():
            raise ValueError(f'a sensor called {min(taken)!r}: that is the name of another input')
        self.normalize = (statistics or NO_STATISTICS).normalize(ordered)
        self.order = band_indices(bands, ordered)

    def forward(self, images: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Normalise images and stack them.

        Args:
            images: Raw values of each sensor, (B, C, H, W). A pixel that is NaN in any band of any
                sensor present holds no data.
            present: Whether each sensor is present, bool of shape (B, S). None: all are.

        Returns:
            Normalised image of shape (B, C, H, W), 0 where there are no data.
        """
        parts = [images[key] for key in self.bands]
        if present is not None:
            # Whatever stands for a missing sensor, NaN too, says nothing of the others' pixels.
            parts = [
                torch.where(present[:, i, None, None, None], part, 0)
                for i, part in enumerate(parts)
            ]
        image: Tensor = self.normalize({'image': torch.cat(parts, dim=1)})['image']
        return image if self.order == sorted(self.order) else image[:, self.order]


class Network(nn.Module):
    """A network on raw values by sensor.

    Args:
        bands: Names of the channels that the model expects, in its order.
        statistics: How they are normalised; None: by the built-in statistics.

    Attributes:
        image: What makes the image of the model.
        inputs: What each input holds: the bands of a sensor, the sensors of 'present' and 'dates'.
        outputs: Names of the outputs.
        multiple: Height and width must be a multiple of this, in pixels.
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
        """What a file has to say of the network.

        Returns:
            Values of JSON: the inputs and outputs, the definitions of the sensors, and mean,
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
    """A backbone on raw values.

    Its outputs are 'features' (B, D), what ``model(x)`` gives, and 'patches' (B, D, H/p, W/p).

    Args:
        model: The backbone, in evaluation mode.
    """

    outputs = ('features', 'patches')

    def __init__(self, model: MultiSensorViT) -> None:
        super().__init__(model.bands, model.statistics)
        self.model = model
        self.multiple = model.patch_size
        # Sizes of 1 are special to torch.export.
        self.smallest = 2 * model.patch_size
        if len(self.image.bands) > 1:
            self.inputs[PRESENT] = tuple(self.image.bands)
        self.inputs[DATES] = model.date_sensors

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of raw values.

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
        """What a file has to say of the network, the architecture too."""
        architecture = self.model.architecture
        said = {} if architecture is None else {'model': architecture.model}
        return {**said, **super().metadata()}


class TaskNetwork(Network):
    """A fine-tuned task on raw values.

    Its output is 'logits', or of a regression 'values'.

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
        """What the task says of raw values.

        Args:
            inputs: Raw values (B, C, H, W) by sensor.

        Returns:
            The output by its name: (B, K, H, W), or (B, K) of a classification.
        """
        output = logits(self.fine_tuned, self.image(inputs))
        if self.fine_tuned.kind == 'classification':
            output = output.flatten(1)
        return {self.outputs[0]: output}

    def metadata(self) -> dict[str, Any]:
        """What a file has to say of the network, its classes too."""
        task = self.fine_tuned
        said = {'model': task.name, 'kind': task.kind, 'several': task.several}
        return {**said, 'classes': task.legend.entry(), **super().metadata()}
