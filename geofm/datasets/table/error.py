"""What is wrong with a table of rasters."""

from geofm.printing import printable


class TableError(ValueError):
    """A table of rasters cannot be used; the message is one line that says what to do."""


def row_error(source: str, row: int, message: str) -> TableError:
    """Error about one row of a table.

    Args:
        source: File of the table.
        row: Index of the row, from 0.
        message: What is wrong and what to do.

    Returns:
        The error. It counts rows from 1, without the header.
    """
    return TableError(printable(f'{source}, row {row + 1}: {message}'))
