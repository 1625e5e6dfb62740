"""Arrays that the processes that read share instead of copying."""

import os
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class SharedArray:
    """A NumPy array of which worker processes need no copy of their own.

    Workers that are forked share the memory of their parent as long as nobody writes to it. Those
    that are spawned map the file of an array that is mapped itself; any other array moves to shared
    memory, once, when the first of them starts.

    Attributes:
        array: The array; it must not be written to.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        """Initialize a new SharedArray instance.

        Args:
            array: The array.
        """
        self.array = np.ascontiguousarray(array)
        self._tensor: torch.Tensor | None = None
        self._file = _mapped_file(self.array)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None or self.array.nbytes == 0:
            # Copied or stored: the content.
            return SharedArray, (self.array,)
        if self._file is not None:
            return _mapped, (self._file,)
        if self._tensor is None:
            content = torch.empty(self.array.nbytes, dtype=torch.uint8).share_memory_()
            content.numpy()[:] = self.array.reshape(-1).view(np.uint8)
            self._attach(content, self.array.dtype, self.array.shape)
        return _attached, (self._tensor, self.array.dtype, self.array.shape)

    def _attach(
        self, tensor: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> 'SharedArray':
        """Look at the content of a tensor of bytes."""
        self._tensor, self._file = tensor, None
        self.array = tensor.numpy().view(dtype).reshape(shape)
        return self


def _attached(tensor: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]) -> SharedArray:
    """An array in memory that another process has shared."""
    # Not through __init__, which would be given no array.
    return SharedArray.__new__(SharedArray)._attach(tensor, dtype, shape)


def _mapped_file(array: npt.NDArray[Any]) -> str | None:
    """The ``.npy`` file that is mapped as an array, all of it; None if there is none."""
    base = array.base
    if not isinstance(base, np.memmap) or base.filename is None:
        return None
    # Of a part of an array, NumPy says the offset of the whole.
    whole = base.nbytes == array.nbytes == os.stat(base.filename).st_size - base.offset  # noqa: PTH116
    same = base.dtype == array.dtype and base.shape == array.shape
    return str(base.filename) if whole and same else None


def _mapped(file: str) -> SharedArray:
    """An array that another process has mapped too."""
    return SharedArray(np.load(file, mmap_mode='r', allow_pickle=False).view(np.ndarray))
