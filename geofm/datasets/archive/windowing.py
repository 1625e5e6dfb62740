"""Divide scenes of any size into a regular grid of windows."""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

type Int32 = npt.NDArray[np.int32]

#: Treatment of a remainder at the lower and right edge of a scene: the last window is shifted
#: inwards and overlaps its neighbour, or the remainder is dropped.
Edge = Literal['shift', 'drop']


class Windows(NamedTuple):
    """Windows of scenes.

    Attributes:
        scene: Index of the scene, int32 (N,), ascending.
        row: First row, int32 (N,).
        col: First column, int32 (N,).
        height: Number of rows, int32 (N,).
        width: Number of columns, int32 (N,).
    """

    scene: Int32
    row: Int32
    col: Int32
    height: Int32
    width: Int32

    def take(self, kept: npt.NDArray[Any]) -> 'Windows':
        """Select windows.

        Args:
            kept: A mask, or the indices of the windows.

        Returns:
            The selected windows.
        """
        return Windows(*(column[kept] for column in self))


def window_grid(sizes: npt.NDArray[Any], size: int | None, edge: Edge = 'shift') -> Windows:
    """Divide scenes into windows.

    Args:
        sizes: Height and width of each scene in pixels, shape (K, 2).
        size: Height and width of the windows in pixels; None for one window of the whole scene.
        edge: Treatment of a remainder at the lower and right edge. Along an axis in which a scene
            is smaller than a window, 'shift' gives a window of the size of the scene, and 'drop'
            gives no window.

    Returns:
        The windows, scene by scene and row by row.
    """
    if size is None:
        scene = np.flatnonzero((sizes > 0).all(axis=1)).astype(np.int32)
        first = np.zeros(len(scene), np.int32)
        return Windows(scene, first, first, *sizes[scene].T.astype(np.int32))
    sizes = sizes.astype(np.int64).reshape(-1, 2)
    step = np.full_like(sizes, size)
    counts = sizes // step if edge == 'drop' else -(-sizes // step)
    scene = np.repeat(np.arange(len(sizes)), counts.prod(axis=1))
    first = np.cumsum(counts.prod(axis=1)) - counts.prod(axis=1)
    number = np.arange(len(scene)) - first[scene]
    columns = np.maximum(counts[scene, 1], 1)
    extent = np.minimum(step, sizes)[scene]
    last = sizes[scene] - extent
    row = np.minimum(number // columns * step[scene, 0], last[:, 0])
    col = np.minimum(number % columns * step[scene, 1], last[:, 1])
    return Windows(*(a.astype(np.int32) for a in (scene, row, col, extent[:, 0], extent[:, 1])))


def shifted(
    transform: npt.NDArray[np.float64], row: npt.NDArray[Any], col: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Return the transforms of parts of grids.

    Args:
        transform: Affine coefficients a to f of the grids, shape (N, 6).
        row: First row of each part, shape (N,).
        col: First column of each part, shape (N,).

    Returns:
        Affine coefficients of the parts, float64 (N, 6).
    """
    moved = transform.copy()
    a, b, _, d, e, _ = transform.T
    moved[:, 2] += a * col + b * row
    moved[:, 5] += d * col + e * row
    return moved
