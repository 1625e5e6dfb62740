"""Coordinate transforms between a patch grid and Web Mercator, in a compact form for a page.

A browser has no library of projections. Over a scene, the transform is so smooth that bilinear
interpolation between the nodes of a coarse mesh is accurate enough.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.warp import transform as transform_points

from geofm.grid import Grid
from geofm.lonlat import near
from geofm.maps.view.tiles import WEB_MERCATOR_CRS, WORLD, mercator_bounds

Doubles = npt.NDArray[np.float64]

#: Maximum error of a mesh between its nodes, in patches.
TOLERANCE = 0.01

#: Maximum number of cells along a side of a mesh.
_MOST_CELLS = 256


@dataclass(frozen=True)
class Mesh:
    """A map from the unit square to the plane, interpolated bilinearly between nodes.

    Attributes:
        nodes: Values of shape (n, n, 2) at (s, t). t increases along the first axis, s along the
            second.
    """

    nodes: Doubles

    def __call__(self, s: Doubles, t: Doubles) -> Doubles:
        """Return the values at (s, t) in [0, 1], of shape (..., 2)."""
        cells = len(self.nodes) - 1
        i, j = (np.clip((v * cells).astype(int), 0, cells - 1) for v in (t, s))
        p, q = (t * cells - i)[..., None], (s * cells - j)[..., None]
        upper = (1 - q) * self.nodes[i, j] + q * self.nodes[i, j + 1]
        lower = (1 - q) * self.nodes[i + 1, j] + q * self.nodes[i + 1, j + 1]
        return (1 - p) * upper + p * lower


def fit_mesh(function: Callable[[Doubles, Doubles], Doubles], tolerance: Doubles) -> Mesh:
    """Fit the coarsest mesh that approximates a function within a tolerance.

    Args:
        function: Map from (s, t) in [0, 1] to values of shape (..., 2).
        tolerance: Maximum error of each of the two values, of shape (2,).

    Returns:
        The mesh. Its error is checked in the middle of its cells and edges, where the error of
        bilinear interpolation of a smooth function is largest.

    Raises:
        ValueError: If the function is not smooth enough for a mesh of 256 x 256 cells.
    """
    cells = 1
    mesh = Mesh(function(*_nodes(cells)))
    while cells < _MOST_CELLS:
        cells *= 2
        nodes = _nodes(cells)
        finer = Mesh(function(*nodes))
        if (np.abs(mesh(*nodes) - finer.nodes) <= tolerance).all():
            return mesh
        mesh = finer
    raise ValueError('the grid is too distorted in Web Mercator: give a scene farther from a pole')


def _nodes(cells: int) -> tuple[Doubles, Doubles]:
    t, s = np.meshgrid(*[np.linspace(0, 1, cells + 1)] * 2, indexing='ij')
    return s, t


@dataclass(frozen=True)
class PatchMap:
    """Transforms between a patch grid and a web map.

    World coordinates are Web Mercator scaled to the unit square, with x to the east and y to the
    south.

    Attributes:
        box: West, north, east and south of the grid in world coordinates. East exceeds 1 if the
            grid crosses the antimeridian.
        to_patch: Transform from (x, y) in the box, scaled to [0, 1], to fractional (row, column).
        to_box: Transform from (column / columns, row / rows) to (x, y) in the box, scaled to
            [0, 1].
    """

    box: tuple[float, float, float, float]
    to_patch: Mesh
    to_box: Mesh

    @classmethod
    def of(cls, grid: Grid) -> 'PatchMap':
        """Fit the meshes of a patch grid.

        Args:
            grid: Grid of the patches, in any CRS and orientation.

        Returns:
            The transforms, accurate to a hundredth of a patch.
        """
        left, bottom, right, top = mercator_bounds(grid)
        origin = np.array([left, top])
        size = np.array([right - left, bottom - top])

        def to_patch(s: Doubles, t: Doubles) -> Doubles:
            x, y = np.moveaxis(origin + np.stack([s, t], axis=-1) * size, -1, 0)
            xs, ys = transform_points(WEB_MERCATOR_CRS, grid.crs, x.ravel(), y.ravel())
            if grid.crs.is_geographic:
                xs = near(xs, (grid.transform @ (grid.width / 2, grid.height / 2))[0])
            rows, cols = grid.pixel_of(xs, ys)
            return np.stack([rows, cols], axis=-1).reshape(*s.shape, 2)

        def to_box(s: Doubles, t: Doubles) -> Doubles:
            x, y = grid.transform @ (s.ravel() * grid.width, t.ravel() * grid.height)
            xs, ys = transform_points(grid.crs, WEB_MERCATOR_CRS, x, y)
            points = np.stack([near(xs, (left + right) / 2, WORLD), ys], axis=-1)
            return ((points - origin) / size).reshape(*s.shape, 2)

        corner, right_of, below, _ = to_box(*_nodes(1)).reshape(4, 2)
        patch = np.abs(right_of - corner) / grid.width + np.abs(below - corner) / grid.height
        return cls(
            (left / WORLD + 0.5, 0.5 - top / WORLD, right / WORLD + 0.5, 0.5 - bottom / WORLD),
            fit_mesh(to_patch, np.full(2, TOLERANCE)),
            fit_mesh(to_box, TOLERANCE * patch),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the data for the page, with nodes row by row."""
        return {
            'box': self.box,
            'toPatch': {'cells': len(self.to_patch.nodes) - 1, 'nodes': _flat(self.to_patch)},
            'toBox': {'cells': len(self.to_box.nodes) - 1, 'nodes': _flat(self.to_box)},
        }


def _flat(mesh: Mesh) -> list[float]:
    return [round(float(value), 7) for value in mesh.nodes.ravel()]
