"""Base class of label files."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend


class LabelError(ValueError):
    """A file of labels cannot be used."""


class LabelSource(ABC):
    """File of labels that can be read on any grid.

    Attributes:
        path: The file.
    """

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that contain the labels."""
        return (self.path,)

    @property
    @abstractmethod
    def legend(self) -> Legend:
        """The classes.

        Raises:
            LabelError: If the labels are not classes.
        """

    @abstractmethod
    def classes_on(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """Return the classes on a grid.

        Args:
            grid: The grid.

        Returns:
            Class values (H, W), :data:`~geofm.legend.NO_CLASS` where there is no label.

        Raises:
            LabelError: If a value does not belong to any class.
        """

    @abstractmethod
    def numbers_on(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Return the numbers on a grid, in the unit of the file.

        Args:
            grid: The grid.

        Returns:
            Numbers (H, W), NaN where there is no label.

        Raises:
            LabelError: If the labels are not numbers.
        """


def legend_of_values(values: Iterable[int]) -> Legend:
    """Make a legend for classes without names.

    Args:
        values: Class values, 0 to 254.

    Returns:
        The legend. The name of value 7 is ``'class 7'``.
    """
    return Legend.of({f'class {int(value)}': int(value) for value in values})


def check_values(
    path: Path, values: npt.NDArray[np.floating], legend: Legend | None, remedy: str
) -> None:
    """Check that numbers are class values.

    Args:
        path: The file, for the message.
        values: Finite numbers of any shape.
        legend: The classes; None for any integers from 0 to 254.
        remedy: Advice at the end of the error message.

    Raises:
        LabelError: If a number is not a class value.
    """
    found = np.unique(values)
    good = (found == np.round(found)) & (found >= 0) & (found < NO_CLASS)
    if legend is not None:
        good &= np.isin(found, legend.values)
    wrong = found[~good]
    if not len(wrong):
        return
    shown = ', '.join(f'{value:g}' for value in wrong[:5]) + (', ...' if len(wrong) > 5 else '')
    if legend is None:
        raise LabelError(f'{path}: {shown}: class values must be integers from 0 to 254; {remedy}')
    classes = ', '.join(f'{c.value} {c.name}' for c in legend.classes)
    raise LabelError(f'{path}: {shown}: not among the classes ({classes}); {remedy}')
