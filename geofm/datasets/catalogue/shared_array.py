"""Arrays that the processes that read share instead of copying."""

from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class SharedArray:
    """A NumPy array of which worker processes need no copy of their own.

    Workers that are forked share the memory of their parent as long as nobody writes to it. For
    those that are spawned the array moves to shared memory, once, when the first of them starts.

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

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None or self.array.nbytes == 0:
            # Copied or stored: the content.
            return SharedArray, (self.array,)
        if self._tensor is None:
            content = torch.empty(self.array.nbytes, dtype=torch.uint8).share_memory_()
            content.numpy()[:] = self.array.reshape(-1).view(np.uint8)
            self._attach(content, self.array.dtype, self.array.shape)
        return _attached, (self._tensor, self.array.dtype, self.array.shape)

    def _attach(
        self, tensor: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> 'SharedArray':
        """Look at the content of a tensor of bytes."""
        self._tensor = tensor
        self.array = tensor.numpy().view(dtype).reshape(shape)
        return self


def _attached(tensor: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]) -> SharedArray:
    """An array in memory that another process has shared."""
    # Not through __init__, which would be given no array.
    return SharedArray.__new__(SharedArray)._attach(tensor, dtype, shape)
