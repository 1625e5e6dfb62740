"""Read columns of CSV and Parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

#: Columns with repeated texts, which are read as dictionaries.
_REPEATED = ['sensor', 'place', 'scene', 'band', 'unit', 'split', 'crs', 'problem']

#: Number of rows per batch.
_BATCH = 1 << 16


class Columns(Protocol):
    """Columns of a file."""

    names: list[str]
    rows: int

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column."""

    def batches(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Yield a column in parts."""


class CsvColumns:
    """Columns of a CSV file, as texts."""

    def __init__(self, path: Path) -> None:
        """Read a file."""
        with path.open('rb') as file:
            head = file.readline()
        names = pacsv.read_csv(pa.BufferReader(head.rstrip(b'\r\n') + b'\n')).column_names
        texts = dict.fromkeys(names, pa.string())
        self._table = pacsv.read_csv(
            path,
            # Errors name the row only if one thread is used.
            read_options=pacsv.ReadOptions(use_threads=False),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types=texts, null_values=[''], strings_can_be_null=True
            ),
        )
        self.names = self._table.column_names
        self.rows = self._table.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column."""
        return self._table.column(name)

    def batches(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Yield a column in parts."""
        yield self.column(name)


class ParquetColumns:
    """Columns of a Parquet file."""

    def __init__(self, path: Path) -> None:
        """Open a file."""
        repeated = [name for name in pq.read_schema(path).names if name in _REPEATED]
        self._file = pq.ParquetFile(path, memory_map=True, read_dictionary=repeated)
        self.names = self._file.schema_arrow.names
        self.rows = self._file.metadata.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column."""
        return self._file.read([name]).column(0)

    def batches(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Yield a column in parts."""
        for batch in self._file.iter_batches(_BATCH, columns=[name]):
            yield pa.chunked_array([batch.column(0)])


class MemoryColumns:
    """Columns of a table in memory."""

    def __init__(self, table: pa.Table) -> None:
        """Initialize a new MemoryColumns instance.

        Args:
            table: The table.
        """
        self._table = table
        self.names: list[str] = table.column_names
        self.rows: int = table.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column."""
        return self._table.column(name)

    def batches(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Yield a column in parts."""
        yield self.column(name)
