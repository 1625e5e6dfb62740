"""Data modules that normalise with the statistics that a model was trained with."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchgeo.datamodules import BaseDataModule

from geofm.datasets import read_statistics
from geofm.models import MultiSensorViT
from geofm.models.checkpoints import INPUT, carry_statistics, read_model
from geofm.printing import warn
from geofm.transforms import InputStatistics, Normalize, statistics_of


class NormalizingDataModule(BaseDataModule):
    """Data module that normalises images by band name.

    For each band, the first of these statistics that exist are used:

    1. those given by the user,
    2. the statistics that the weights of the model were trained with. They are read from the
       backbone of the task, from the file given to the task as *weights*, or from the checkpoint
       that is resumed or tested,
    3. the built-in statistics of :mod:`geofm.sensors`.

    The statistics in use are part of the state of the data module, and therefore of checkpoints.
    """

    _own_statistics: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {})
    _carried: InputStatistics | None = None

    def normalize_by(
        self,
        bands: Sequence[str],
        mean: Mapping[str, float] | None = None,
        std: Mapping[str, float] | None = None,
    ) -> None:
        """Set the normalisation.

        Args:
            bands: Names of the channels, in their order.
            mean: Means given by the user, by band, for any of the bands.
            std: Standard deviations given by the user, by band, for any of the bands.
        """
        self._own_statistics = (mean or {}, std or {})
        default = Normalize(bands) if self._carried is None else self._carried.normalize(bands)
        known = InputStatistics.of(default)
        means, stds = (
            {band: given.get(band, values[band]) for band in bands}
            for given, values in zip(self._own_statistics, (known.mean, known.std), strict=True)
        )
        self.aug: Any = InputStatistics(means, stds, known.clip).normalize(bands)
        # TorchGeo's tasks convert images back to raw units with these before plotting.
        self.mean, self.std = self.aug.mean.flatten(), self.aug.std.flatten()

    def normalize_by_file(self, bands: Sequence[str], file: str | None) -> None:
        """Set the normalisation to the statistics of a file.

        Args:
            bands: Names of the channels, in their order.
            file: YAML file with mean and standard deviation of each band, as written by
                ``geofm stats``; None for the defaults.

        Raises:
            ValueError: If the file cannot be read.
        """
        given: list[dict[str, float]] = []
        if file is not None:
            values = read_statistics(file, bands)
            given = [dict(zip(bands, value.tolist(), strict=True)) for value in values]
        self.normalize_by(tuple(bands), *given)

    def take_up_statistics(self) -> None:
        """Use the statistics that the weights of the task were trained with, if known."""
        task = self.trainer.lightning_module if self.trainer and self.trainer.model else None
        if task is not None:
            self._take_up(*weights_statistics(task))

    def _take_up(self, statistics: InputStatistics | None, source: str) -> None:
        """Normalise with the statistics of weights, except for bands given by the user."""
        if not isinstance(self.aug, Normalize):
            return
        self._carried = statistics
        self.normalize_by(self.aug.bands, *self._own_statistics)
        if statistics is None:
            return
        if others := InputStatistics.of(self.aug).differs(statistics):
            warn(
                f'{type(self).__name__} normalises {", ".join(others)} with the given statistics, '
                f'but {source} was trained with others: leave them out to use those'
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics in use, for a checkpoint.

        Returns:
            The state.
        """
        return carry_statistics(statistics_of(self.aug))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Use the statistics of the run that wrote a checkpoint.

        Args:
            state_dict: State returned by :meth:`state_dict`.

        Raises:
            ValueError: If the state is invalid.
        """
        if INPUT in state_dict:
            self._take_up(InputStatistics.from_entry(state_dict[INPUT]), 'the checkpoint')


def weights_statistics(task: Any) -> tuple[InputStatistics | None, str]:
    """Return the statistics that the weights of a task were trained with.

    Args:
        task: A Lightning module of geofm, or of TorchGeo with a file as ``weights``.

    Returns:
        The statistics, or None if they are not known, and the name of the weights for messages.
    """
    for module in task.modules():
        if isinstance(module, MultiSensorViT) and module.statistics is not None:
            return module.statistics, 'the backbone'
    weights = getattr(task, 'weights', None)
    if isinstance(weights, str | os.PathLike) and Path(weights).is_file():
        return read_model(weights).statistics, str(weights)
    return None, ''
