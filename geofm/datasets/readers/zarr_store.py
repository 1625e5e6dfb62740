"""Read Zarr stores, which are a folder or a zip file."""

from pathlib import Path
from typing import Any, cast

from geofm.datasets.readers.arrays import ArrayAddress, Group, open_group
from geofm.datasets.readers.source import Source


class ZarrReader:
    """Reader of arrays in ``.zarr`` folders and ``.zarr.zip`` files."""

    def accepts(self, address: str) -> bool:
        """Check whether this reader is responsible for an address.

        Args:
            address: Absolute path or address.

        Returns:
            Whether it is a Zarr store, or an array in one.
        """
        start = address.lower()
        return start.startswith('zarr:') or start.endswith(('.zarr', '.zarr.zip'))

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open arrays of a store.

        Args:
            address: The store, or ``ZARR:"store.zarr.zip":/array:3`` for index 3 of the first
                dimension of an array.
            sensor: Key of the sensor to read.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such store.
            ValueError: If it cannot be read.
        """
        # Importing zarr takes a second.
        import zarr
        from zarr.storage import LocalStore, ZipStore

        where = ArrayAddress.parse(address)
        path = Path(where.file)
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file')
        store: Any = None
        try:
            store = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode='r')
            group = zarr.open(store, mode='r')
        except Exception as error:
            # Damaged stores raise about a dozen types of error.
            if store is not None:
                store.close()
            raise ValueError(f'{path}: cannot be read as Zarr ({error})') from error
        try:
            members: Any = {'bands': group} if isinstance(group, zarr.Array) else group
            wrapped = _Members(members) if isinstance(members, dict) else members
            return open_group(cast(Group, wrapped), address, where, sensor, 'Zarr', store)
        except BaseException:
            store.close()
            raise


class _Members(dict[str, Any]):
    """Store that consists of one array, as a group."""

    attrs: dict[str, Any] = {}  # noqa: RUF012 - it is never modified
