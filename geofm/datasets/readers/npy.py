"""NumPy's own files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.datasets.readers.arrays import ArraySource, layers_of
from geofm.datasets.readers.source import Source
from geofm.sensors import SENSORS


class NpyReader:
    """Images in ``.npy`` files: (H, W), (C, H, W) or (H, W, C), without CRS."""

    def accepts(self, address: str) -> bool:
        """Tell by the name.

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
            sensor: Key of its sensor. The axis with as many entries as the sensor has bands is
                that of bands; if none or both have, the first one, unless the last is shorter.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no array of numbers.
        """
        try:
            # Only what is read comes into memory; objects could run code.
            array = np.load(address, mmap_mode='r', allow_pickle=False)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f'{address}: cannot be read as NPY ({error})') from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in 'biuf':
            raise ValueError(f'{address}: an array of {array.dtype}, not of numbers')
        known = None if sensor is None else SENSORS[sensor]
        return ArraySource(address, 'NPY', layers_of(_Plain(array), (), known, address))


class _Plain:
    """An array without attributes."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype
        self.attrs: Mapping[str, Any] = {}

    def __getitem__(self, key: Any) -> Any:
        return self._array[key]
