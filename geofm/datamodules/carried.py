"""Data modules that normalise as the weights in use were trained."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchgeo.datamodules import BaseDataModule

from geofm.datasets.statistics import read_statistics
from geofm.models import MultiSensorViT
from geofm.models.checkpoints.model_file import read_model
from geofm.models.checkpoints.statistics import INPUT, carry_statistics
from geofm.transforms import Normalize
from geofm.transforms.statistics import InputStatistics, statistics_of


class NormalizingDataModule(BaseDataModule):
    """Normalises by statistics that are given; or else as the weights in use were trained.

    Statistics that the user gives come first. For bands without them come those that the weights in
    use were trained with: of the backbone of the task, of the file that the task was given as
    *weights*, or of the checkpoint that is resumed or tested. Without any the built-in ones of
    :mod:`geofm.sensors` are used.

    The statistics in use are part of the data module's state, and so of every checkpoint.
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
            mean: Means that the user gives, by band: of some bands or all.
            std: Standard deviations that the user gives, likewise.
        """
        self._own_statistics = (mean or {}, std or {})
        default = Normalize(bands) if self._carried is None else self._carried.normalize(bands)
        known = InputStatistics.of(default)
        means, stds = (
            {band: given.get(band, values[band]) for band in bands}
            for given, values in zip(self._own_statistics, (known.mean, known.std), strict=True)
        )
        self.aug: Any = InputStatistics(means, stds, known.clip).normalize(bands)
        # TorchGeo's tasks bring images back to raw units with these before they draw them.
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
        """Take up the statistics that the weights of the task were trained with, if any."""
        task = self.trainer.lightning_module if self.trainer and self.trainer.model else None
        if task is not None:
            self._take_up(*weights_statistics(task))

    def _take_up(self, statistics: InputStatistics | None, source: str) -> None:
        """Normalise by the statistics of weights, all but what the user gave."""
        if not isinstance(self.aug, Normalize):
            return
        self._carried = statistics
        self.normalize_by(self.aug.bands, *self._own_statistics)
        if statistics is None:
            return
        if others := InputStatistics.of(self.aug).differs(statistics):
            warnings.warn(
                f'{type(self).__name__} normalises {", ".join(others)} by the statistics that it '
                f'was given, but {source} was trained with others: leave them out to use those',
                UserWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The statistics in use, for a checkpoint.

        Returns:
            The state.
        """
        return carry_statistics(statistics_of(self.aug))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the statistics of the run that wrote a checkpoint.

        Args:
            state_dict: As of :meth:`state_dict`.

        Raises:
            ValueError: If they are damaged.
        """
        if INPUT in state_dict:
            self._take_up(InputStatistics.from_entry(state_dict[INPUT]), 'the checkpoint')


def weights_statistics(task: Any) -> tuple[InputStatistics | None, str]:
    """Statistics that the weights of a task were trained with.

    Args:
        task: A Lightning module: this project's, or one of TorchGeo with the file that it was given
            as ``weights``.

    Returns:
        The statistics, None if they are not known; and what the weights are called.
    """
    for module in task.modules():
        if isinstance(module, MultiSensorViT) and module.statistics is not None:
            return module.statistics, 'the backbone'
    weights = getattr(task, 'weights', None)
    if isinstance(weights, str | os.PathLike) and Path(weights).is_file():
        return read_model(weights).statistics, str(weights)
    return None, ''
