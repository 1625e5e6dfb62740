"""Errors about tables of rasters."""

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
