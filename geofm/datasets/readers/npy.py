"""Read NumPy files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.datasets.readers.arrays import ArraySource, layers_of
from geofm.datasets.readers.source import Source
from geofm.sensors import SENSORS


class NpyReader:
    """Reader of images in ``.npy`` files: (H, W), (C, H, W) or (H, W, C), without CRS."""

    def accepts(self, address: str) -> bool:
        """Check whether this reader is responsible for an address.

        Args:
            address: Absolute path.

        Returns:
            Whether it ends in ``.npy``.
        """
        return address.lower().endswith('.npy')

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open an array.

        Args:
            address: Absolute path.
            sensor: Key of the sensor. The axis whose length is its number of bands is the band
                axis. If that is ambiguous, it is the first axis, unless the last one is shorter.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not an array of numbers.
        """
        try:
            # Map the file, so that only the parts that are read are loaded. Pickled objects could
            # run code.
            array = np.load(address, mmap_mode='r', allow_pickle=False)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f'{address}: cannot be read as NPY ({error})') from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in 'biuf':
            raise ValueError(f'{address}: holds an array of {array.dtype}, not of numbers')
        known = None if sensor is None else SENSORS[sensor]
        return ArraySource(address, 'NPY', layers_of(_Plain(array), (), known, address))


class _Plain:
    """Array without attributes."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype
        self.attrs: Mapping[str, Any] = {}

    def __getitem__(self, key: Any) -> Any:
        return self._array[key]
