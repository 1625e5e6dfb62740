"""Outlines in longitude and latitude, compared with areas and distances on the sphere."""

import numpy as np
import numpy.typing as npt
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Geod
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm import lonlat
from geofm.grid import Grid

DEGREES = CRS.from_epsg(4326)
GEOD = Geod(ellps='WGS84')


def square(west: float, south: float, side: float = 0.2) -> npt.NDArray[np.float64]:
    """Return corners with longitudes in [-180, 180], like PROJ does."""
    lon = np.array([west, west + side, west + side, west])
    lat = np.array([south + side, south + side, south, south])
    return np.stack([(lon + 180) % 360 - 180, lat], axis=-1)


def area(shape: shapely.Geometry) -> float:
    """Return the area on the ellipsoid in km²."""
    return abs(GEOD.geometry_area_perimeter(shape)[0]) / 1e6


@pytest.mark.parametrize('west', [10.0, 179.7, 179.8, 179.85, 179.9, 179.999, -180.0, -179.95])
def test_the_area_of_a_square_does_not_depend_on_its_place(west: float) -> None:
    (shape,) = lonlat.outlines(square(west, -16.5)[None])
    expected = area(shapely.box(0, -16.5, 0.2, -16.3))
    assert area(shape) == pytest.approx(expected, rel=1e-5)
    left, _, right, _ = shape.bounds
    assert -180 <= left < right <= 180
    crosses = 179.8 < west < 180
    assert shape.geom_type == ('MultiPolygon' if crosses else 'Polygon')
    (running,) = lonlat.outlines(square(west, -16.5)[None], cut=False)
    assert running.geom_type == 'Polygon'
    assert running.bounds[2] - running.bounds[0] == pytest.approx(0.2)
    assert -180 <= running.bounds[0] < 180


def test_outlines_that_do_not_cross_180_degrees_are_unchanged() -> None:
    points = np.random.default_rng(0).uniform(-80, 80, (50, 4, 2))
    assert lonlat.unroll(points) is points
    points[7, 2] = np.nan
    shapes = lonlat.outlines(points)
    assert shapes[7] is None
    assert shapely.equals_exact(shapes[8], shapely.Polygon(points[8]), 0)


@pytest.mark.parametrize('pole', [90, -90])
@pytest.mark.parametrize('turn', [0.0, 30.0, 137.0])
def test_outlines_over_a_pole_contain_the_pole(pole: int, turn: float) -> None:
    """A square of 1 degree around the pole has the area of four triangles with a corner there."""
    lon = (np.array([0, 90, 180, 270]) + turn + 180) % 360 - 180
    points = np.stack([lon, np.full(4, pole - np.sign(pole) * 1.0)], axis=-1)
    for ring in (points, points[::-1], np.concatenate([points, points[:1]])):
        (shape,) = lonlat.outlines(ring[None])
        assert shape.is_valid
        # In longitude and latitude, it is a band from the corners to the pole.
        assert shape.area == pytest.approx(360.0)
        assert shapely.intersects_xy(shape, np.linspace(-180, 180, 9), pole * 0.9999).all()
        south, north = sorted([pole - np.sign(pole), pole])
        np.testing.assert_allclose(lonlat.extents(ring[None])[0], [-180, south, 180, north])


def test_an_outline_with_a_corner_on_the_pole_is_a_wedge() -> None:
    # The longitude of the pole is arbitrary.
    points = np.array([[0.0, 90.0], [10.0, 89.0], [55.0, 88.6], [100.0, 89.0]])
    for ring in (points, np.roll(points, 2, axis=0), points[::-1]):
        (shape,) = lonlat.outlines(ring[None])
        assert shape.is_valid
        assert shape.bounds == pytest.approx((10, 88.6, 100, 90))
        assert shapely.intersects_xy(shape, 90, 89.99)
        assert not shapely.intersects_xy(shape, 5, 89.99)


@given(
    st.lists(
        st.tuples(st.floats(-180, 179.9), st.floats(0.01, 60), st.floats(-60, 60)),
        min_size=1,
        max_size=6,
    )
)
def test_a_bounding_box_is_the_smallest_that_covers_all(
    squares: list[tuple[float, float, float]],
) -> None:
    boxes = np.array([[west, south, west + side, south + 1] for west, side, south in squares])
    west, south, east, north = lonlat.bounding_box(boxes)
    width = (east - west) % 360 if (west, east) != (-180, 180) else 360
    for left, bottom, right, top in boxes:
        assert south <= bottom
        assert top <= north
        # Both ends, counted from the west of the box, are inside.
        inside = (left - west) % 360
        if width < 360 and inside < 359.999999:
            assert inside + (right - left) <= width + 1e-6
    # No smaller one: brute force over boxes that start at the west of each.
    smallest = min(
        max((left - start) % 360 + (right - left) for left, _, right, _ in boxes)
        for start in boxes[:, 0]
    )
    plain = boxes[:, 2].max() <= 180 and boxes[:, 2].max() - boxes[:, 0].min() <= 180
    assert width <= max(smallest, (boxes[:, 2].max() - boxes[:, 0].min()) * plain) + 1e-6 or (
        smallest > 359
    )


def test_bounding_boxes_follow_rfc_7946() -> None:
    fiji = lonlat.extents(np.stack([square(177, -19, 1), square(179.9, -17), square(-179, -16)]))
    assert lonlat.bounding_box(fiji) == pytest.approx((177, -19, -178.8, -15.8))
    europe = np.array([[5.0, 40, 6, 41], [20, 60, 21, 61]])
    assert lonlat.bounding_box(europe) == (5, 40, 21, 61)
    assert lonlat.bounding_box(np.array([[-180.0, 80, 180, 90]])) == (-180, 80, 180, 90)


@pytest.mark.parametrize(
    ('crs', 'transform'),
    [
        (CRS.from_epsg(32760), Affine(10, 0, 819_500, 0, -10, 8_174_200)),
        (CRS.from_epsg(32701), Affine(10, 0, 178_900, 0, -10, 8_174_200)),
        (DEGREES, Affine(9e-5, 0, 179.9928, 0, -9e-5, -16.4928)),
        (DEGREES, Affine(9e-5, 0, -180.0072, 0, -9e-5, -16.4928)),
    ],
    ids=['zone 60', 'zone 1', 'beyond 180', 'beyond -180'],
)
@pytest.mark.parametrize('place', [180.0, -180.0, 179.995, -179.995, 180.005, 540.0])
def test_a_place_is_found_by_equivalent_longitudes(
    crs: CRS, transform: Affine, place: float
) -> None:
    grid = Grid(crs, transform, 160, 160)
    row, col = lonlat.pixel_at(grid, place, -16.5)
    assert 0 <= row < 160
    assert 0 <= col < 160
    x, y = grid.transform @ (col, row)
    ((lon, lat),) = lonlat.transform_to_lonlat(grid, [x], [y])
    assert GEOD.inv(lon, lat, place, -16.5)[2] < 0.01
    west, south, east, north = lonlat.bounds(grid)
    assert west > 179.98
    assert east < -179.98
    assert -16.52 < south < north < -16.48
