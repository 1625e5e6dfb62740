"""Arrays that worker processes share instead of copying."""

import os
from collections.abc import Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class SharedArray:
    """NumPy array that is not copied for worker processes.

    Forked workers share the memory of their parent until it is written to. Spawned workers map the
    same file if the array is memory-mapped. Any other array moves to shared memory once, when the
    first worker is spawned.

    Attributes:
        array: The array. It must not be modified.
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
            # Copying or pickling to a file: store the content.
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
        """Use the content of a tensor of bytes."""
        self._tensor, self._file = tensor, None
        self.array = tensor.numpy().view(dtype).reshape(shape)
        return self


class SharedFields:
    """Base of dataclasses whose arrays are shared with worker processes."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker process, with arrays in shared memory."""
        memory: dict[str, SharedArray] = vars(self).setdefault('_memory', {})
        return {
            name: memory.setdefault(name, SharedArray(value))
            if isinstance(value, np.ndarray)
            else value
            for name, value in list(vars(self).items())
            if name != '_memory'
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(
            {k: v.array if isinstance(v, SharedArray) else v for k, v in state.items()}
        )


def _attached(tensor: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]) -> SharedArray:
    """Return an array in memory that another process has shared."""
    # __init__ needs an array, which does not exist yet.
    return SharedArray.__new__(SharedArray)._attach(tensor, dtype, shape)


def _mapped_file(array: npt.NDArray[Any]) -> str | None:
    """Return the ``.npy`` file that is mapped as this whole array, if any."""
    base = array.base
    if not isinstance(base, np.memmap) or base.filename is None:
        return None
    # For a slice, NumPy reports the offset of the whole array.
    whole = base.nbytes == array.nbytes == os.stat(base.filename).st_size - base.offset  # noqa: PTH116
    same = base.dtype == array.dtype and base.shape == array.shape
    return str(base.filename) if whole and same else None


def _mapped(file: str) -> SharedArray:
    """Map an array that another process has mapped too."""
    return SharedArray(np.load(file, mmap_mode='r', allow_pickle=False).view(np.ndarray))
