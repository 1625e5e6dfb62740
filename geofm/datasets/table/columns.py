"""Convert columns of a table of rasters from Arrow to NumPy, with errors that name the row."""

import datetime
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geofm.datasets.table.error import TableError, refuse_rows, row_error
from geofm.printing import printable

#: Time of a row without a time: NumPy's NaT as int64.
NO_TIME = int(np.datetime64('NaT').astype(np.int64))

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_MICROSECOND = datetime.timedelta(microseconds=1)


class Coded(NamedTuple):
    """Column with few distinct texts.

    Attributes:
        codes: Index into *values* for each row, int32 (N,); -1 where the row has no text.
        values: The distinct texts.
    """

    codes: npt.NDArray[np.int32]
    values: pa.StringArray


def text_codes(column: pa.ChunkedArray, name: str, source: str) -> Coded:
    """Convert a column of texts.

    Args:
        column: The column. Integers are converted to texts.
        name: Name of the column.
        source: File of the table, for error messages.

    Returns:
        The texts without surrounding blanks. Empty texts are missing.

    Raises:
        TableError: If the column has another type, or a text contains a NUL character.
    """
    encoded = as_text(column, name, source)
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    if encoded.num_chunks == 0:
        return Coded(np.full(0, -1, np.int32), pa.array([], pa.string()))
    whole = encoded.unify_dictionaries().combine_chunks()
    raw = whole.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    texts = pc.utf8_trim_whitespace(whole.dictionary)
    given = pc.if_else(pc.equal(texts, ''), pa.scalar(None, pa.string()), texts)
    again = given.dictionary_encode()
    new = again.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    codes = raw if np.array_equal(new, np.arange(len(new))) else np.append(new, -1)[raw]
    values = again.dictionary
    # A dictionary may have texts that do not occur in any row.
    used = np.bincount(codes + 1, minlength=len(values) + 1)[1:] > 0
    if not used.all():
        codes = np.append(np.cumsum(used) - 1, -1)[codes]
        values = values.filter(pa.array(used))
    bad = pc.match_substring(values, '\0').to_numpy(zero_copy_only=False).astype(bool)
    refuse_rows(source, np.append(bad, False)[codes], f'{name} contains a NUL character')
    return Coded(codes.astype(np.int32, copy=False), values)


def as_text(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    """Convert a column to strings.

    Args:
        column: The column, of texts or integers.
        name: Name of the column.
        source: File of the table, for error messages.

    Returns:
        Strings, or a dictionary of strings.

    Raises:
        TableError: If the column has another type.
    """
    kind = column.type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(inner):
        return column
    if pa.types.is_large_string(inner) or pa.types.is_string_view(inner):
        return column.cast(pa.string())
    if pa.types.is_floating(inner):
        # pandas converts integers to floating-point numbers if some are missing.
        try:
            return column.cast(pa.int64()).cast(pa.string())
        except pa.ArrowInvalid:
            return column.cast(pa.string())
    if pa.types.is_integer(inner) or pa.types.is_null(inner):
        return column.cast(pa.string())
    raise TableError(f"{source}: column '{name}' has the type {kind}, but must have texts")


def parse_values(
    column: pa.ChunkedArray, name: str, source: str, parse: Callable[[str], Any], expected: str
) -> tuple[npt.NDArray[np.int32], list[Any]]:
    """Convert a column of texts by a function.

    Args:
        column: The column.
        name: Name of the column.
        source: File of the table, for error messages.
        parse: Function that converts a text, and raises ValueError if it is invalid.
        expected: Description of a valid text, for error messages.

    Returns:
        Codes as in :class:`Coded`, and the values of these codes.

    Raises:
        TableError: If a text cannot be parsed.
    """
    codes, texts = text_codes(column, name, source)
    values = []
    for code, text in enumerate(texts.to_pylist()):
        try:
            values.append(parse(text))
        except (ValueError, OverflowError) as error:
            raise row_error(
                source,
                first_row(codes == code),
                f"{name} '{shorten(text)}' is not {expected}",
            ) from error
    return codes, values


def numbers(column: pa.ChunkedArray, name: str, source: str) -> npt.NDArray[np.float64]:
    """Convert a column of numbers.

    Args:
        column: The column, of numbers or texts.
        name: Name of the column.
        source: File of the table, for error messages.

    Returns:
        The numbers, float64 (N,); NaN where missing.

    Raises:
        TableError: If a text is not a number, or the column has another type.
    """
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        # A safe cast fails for integers that float64 cannot represent exactly.
        filled = column.cast(pa.float64(), safe=False)
        return np.array(filled.to_numpy(), np.float64)
    codes, values = parse_values(column, name, source, _number, 'a number')
    return np.array([*values, math.nan], np.float64)[codes]


def _number(text: str) -> float:
    # Python would accept '1_000'.
    if '_' in text:
        raise ValueError(text)
    return float(text)


def integers(
    column: pa.ChunkedArray, name: str, source: str, lowest: int, highest: int, missing: int = -1
) -> npt.NDArray[np.int64]:
    """Convert a column of integers.

    Args:
        column: The column, of numbers or texts.
        name: Name of the column.
        source: File of the table, for error messages.
        lowest: Smallest number allowed.
        highest: Largest number allowed.
        missing: Value for rows without a number.

    Returns:
        The numbers, int64 (N,).

    Raises:
        TableError: If a number is not an integer, or out of range.
    """
    values = numbers(column, name, source)
    missed = np.isnan(values)
    with np.errstate(invalid='ignore'):
        bad = ~missed & ~((values >= lowest) & (values <= highest) & (values == np.floor(values)))
    expected = f'an integer from {lowest:,} to {highest:,}'
    refuse_rows(source, bad, f'{name} {{:g}} is not {expected}', values)
    return np.where(missed, missing, values).astype(np.int64)


def times(column: pa.ChunkedArray, name: str, source: str) -> npt.NDArray[np.int64]:
    """Convert a column of dates or times.

    Args:
        column: The column, of timestamps, dates, or ISO 8601 texts. Times without a time zone are
            UTC.
        name: Name of the column.
        source: File of the table, for error messages.

    Returns:
        Microseconds since 1970-01-01 UTC, int64 (N,); :data:`NO_TIME` where missing.

    Raises:
        TableError: If a text is not a date, or the column has another type.
    """
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        # Arrow stores UTC; the time zone is only for display.
        try:
            exact = column.cast(pa.timestamp('us', kind.tz if hasattr(kind, 'tz') else None), False)
            plain = exact.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise TableError(f"{source}: column '{name}': {error}") from error
        return np.array(pc.fill_null(plain, NO_TIME).to_numpy(), np.int64)
    codes, values = parse_values(
        column, name, source, _microseconds, 'a date such as 2018-02-28 or 2018-02-28T10:15:30'
    )
    return np.array([*values, NO_TIME], np.int64)[codes]


def _microseconds(text: str) -> int:
    # Missing values as written by pandas.
    if text in ('NaT', 'nan', 'None'):
        return NO_TIME
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - _EPOCH) // _MICROSECOND


def first_row(mask: npt.NDArray[np.bool_]) -> int:
    """Return the first row where a mask is True.

    Args:
        mask: The mask, (N,).

    Returns:
        Index of the row; 0 if the mask is False everywhere.
    """
    return int(np.argmax(mask)) if mask.size else 0


def shorten(text: str) -> str:
    """Shorten a text to fit into a message of one line.

    Args:
        text: The text.

    Returns:
        At most 80 printable characters.
    """
    return printable(text if len(text) <= 80 else text[:77] + '...')
