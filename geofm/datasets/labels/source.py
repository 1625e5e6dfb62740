"""What files of labels have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend


class LabelError(ValueError):
    """A file of labels that cannot be used."""


class LabelSource(ABC):
    """A file of labels, read on any grid.

    Attributes:
        path: The file.
    """

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the labels."""
        return (self.path,)

    @property
    @abstractmethod
    def legend(self) -> Legend:
        """The classes.

        Raises:
            LabelError: If the labels are no classes.
        """

    @abstractmethod
    def classes_on(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """Classes on a grid.

        Args:
            grid: The grid.

        Returns:
            Values of classes (H, W), :data:`~geofm.legend.NO_CLASS` where there is no label.

        Raises:
            LabelError: If a value is no class.
        """

    @abstractmethod
    def numbers_on(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Numbers on a grid, in the unit of the file.

        Args:
            grid: The grid.

        Returns:
            Numbers (H, W), NaN where there is none.

        Raises:
            LabelError: If the labels are no numbers.
        """


def legend_of_values(values: Iterable[int]) -> Legend:
    """A legend of classes that have no names.

    Args:
        values: Their values, 0 to 254.

    Returns:
        The legend; the name of value 7 is ``'class 7'``.
    """
    return Legend.of({f'class {int(value)}': int(value) for value in values})


def check_values(
    path: Path, values: npt.NDArray[np.floating], legend: Legend | None, remedy: str
) -> None:
    """Check that numbers are values of classes.

    Args:
        path: The file, for the message.
        values: Numbers of any shape, all finite.
        legend: The classes; None for any whole numbers of 0 to 254.
        remedy: What to do about numbers that are none.

    Raises:
        LabelError: If a number is not the value of a class.
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
        raise LabelError(f'{path}: {shown}: classes are whole numbers of 0 to 254; {remedy}')
    classes = ', '.join(f'{c.value} {c.name}' for c in legend.classes)
    raise LabelError(f'{path}: {shown}: none of the classes ({classes}); {remedy}')
