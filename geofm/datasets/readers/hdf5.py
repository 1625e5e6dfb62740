"""Read HDF5 and netCDF-4 files with h5py."""

import datetime
import re
from typing import cast

import h5py
import numpy as np
import numpy.typing as npt

from geofm.datasets.readers.arrays import ArrayAddress, Group, open_group
from geofm.datasets.readers.source import Source
from geofm.rasters import open_raster

_ENDINGS = ('.h5', '.hdf5', '.he5', '.nc', '.nc4')

_UNITS = re.compile(r'(seconds|minutes|hours|days)\s+since\s+(.+)', re.IGNORECASE)


class Hdf5Reader:
    """Reader of arrays in HDF5 files, and of variables of netCDF-4 files."""

    def accepts(self, address: str) -> bool:
        """Check whether this reader is responsible for an address.

        Args:
            address: Absolute path or address.

        Returns:
            Whether it is an HDF5 or netCDF file, or an array in one.
        """
        start = address.lower()
        return start.startswith(('hdf5:', 'netcdf:')) or start.endswith(_ENDINGS)

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open a raster. netCDF-3 files are read by GDAL.

        Args:
            address: Absolute path or address.
            sensor: Key of the sensor to read.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read.
        """
        where = ArrayAddress.parse(address)
        with open(where.file, 'rb'):  # noqa: PTH123 - raises a clear error
            pass
        if not h5py.is_hdf5(where.file):
            return cast(Source, open_raster(address))
        try:
            file = h5py.File(where.file, 'r')
        except OSError as error:
            raise ValueError(f'{where.file}: cannot be read as HDF5 ({error})') from error
        try:
            return open_group(cast(Group, file), address, where, sensor, 'HDF5', file)
        except BaseException:
            file.close()
            raise


def dates_of(file: str, name: str) -> npt.NDArray[np.datetime64]:
    """Read the times of a time coordinate.

    Args:
        file: A netCDF-4 or HDF5 file.
        name: Name of the coordinate.

    Returns:
        Times in microseconds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such coordinate, or its unit does not follow the CF conventions.
    """
    with h5py.File(file, 'r') as content:
        if name not in content:
            raise ValueError(f"{file}: no time coordinate '{name}'; it has {', '.join(content)}")
        values = content[name][:]
        units = content[name].attrs.get('units', '')
    text = units.decode() if isinstance(units, bytes) else str(units)
    match = _UNITS.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{file}: unit of '{name}' is '{text}', but must be like 'days since 2018-01-01'"
        )
    try:
        since = datetime.datetime.fromisoformat(match[2].strip())
    except ValueError as error:
        raise ValueError(f"{file}: unit of '{name}' is '{text}', not a valid date") from error
    start = np.datetime64(since.replace(tzinfo=None), 'us')
    factor = {'seconds': 1, 'minutes': 60, 'hours': 3600, 'days': 86_400}[match[1].lower()]
    steps = np.round(np.asarray(values, np.float64) * factor * 1e6)
    return start + steps.astype('timedelta64[us]')


def variables_of(file: str) -> list[str]:
    """List the arrays of a file with three or more dimensions.

    Args:
        file: A netCDF-4 or HDF5 file.

    Returns:
        Their names.
    """
    with h5py.File(file, 'r') as content:
        return [
            name
            for name, member in content.items()
            if isinstance(member, h5py.Dataset) and member.ndim >= 3
        ]
