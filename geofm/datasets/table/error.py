"""Errors about tables of rasters."""

from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.printing import printable


class TableError(ValueError):
    """A table of rasters cannot be used. The message is one line that says what to do."""


def row_error(source: str, row: int, message: str) -> TableError:
    """Make an error about a row of a table.

    Args:
        source: File of the table.
        row: Index of the row, from 0.
        message: The problem and what to do.

    Returns:
        The error. Its message counts rows from 1, without the header.
    """
    return TableError(printable(f'{source}, row {row + 1}: {message}'))


def refuse_rows(source: str, bad: npt.NDArray[np.bool_], message: str, values: Any = None) -> None:
    """Raise an error if a row of a table is bad.

    Args:
        source: File of the table.
        bad: Which rows are bad, (N,).
        message: The problem and what to do, see :func:`row_error`. With *values*, its placeholder
            ``{}`` is the value of the first bad row.
        values: Values of the rows, (N,).

    Raises:
        TableError: If a row is bad. The message names the first one.
    """
    if bad.any():
        row = int(np.argmax(bad))
        raise row_error(source, row, message if values is None else message.format(values[row]))
