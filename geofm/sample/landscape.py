"""Generate landscapes: which surface is where, and how it varies in space."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geofm.sample.surfaces import SURFACES, Floats, surface_classes, surface_index, surface_values

type Ints = npt.NDArray[np.int64]

# Surfaces of fields by use: winter crops, summer crops, grass. The more common surface is first.
_FIELD_SURFACES = np.array(
    [
        [surface_index(name) for name in names]
        for names in (('wheat', 'rapeseed'), ('maize', 'sugar beet'), ('pasture', 'meadow'))
    ]
)

# Side, in pixels, of a landscape for which the lengths below are defined. For smaller landscapes
# they are scaled down, so that small data sets have all classes too.
_REFERENCE = 512
_RELIEF = 170.0
_DISTRICT = 120.0
# Mean and standard deviation of the elevation, in metres.
_MEAN_ELEVATION, _ELEVATION_RANGE = 240.0, 45.0
# Upper bound of the number of fields of a district along one axis.
_FIELDS = 4096


@dataclass(frozen=True)
class Landscape:
    """Ground of a region of interest.

    A unit is an area with uniform properties except for its texture: a field, a building plot, or
    the total area of a natural surface.

    Attributes:
        land_cover: Class values, uint8 of shape (H, W).
        unit: Unit of each pixel, of shape (H, W).
        surface: Surface of each unit, as an index into `SURFACES`.
        delay: Delay of the season of each unit in days.
        gain: Relative brightness of each unit.
        brightness: Relative brightness of each pixel, of shape (H, W).
        vigour: Deviation of the green fraction of each pixel from its unit's, of shape (H, W).
        backscatter: Deviation of the backscatter of each pixel from its unit's in dB, of shape (H,
            W).
        slope: Southward slope of each pixel, of shape (H, W), with standard deviation 1 on land.
        elevation: Height above sea level of each pixel in metres, of shape (H, W).
    """

    land_cover: npt.NDArray[np.uint8]
    unit: Ints
    surface: Ints
    delay: Floats
    gain: Floats
    brightness: Floats
    vigour: Floats
    backscatter: Floats
    slope: Floats
    elevation: Floats


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], length: float, power: float = 3.0
) -> Floats:
    """Draw a Gaussian random field with a power-law spectrum that wraps at the edges.

    Args:
        rng: Random generator.
        shape: Height and width.
        length: Wavelength in pixels beyond which the spectrum is flat.
        power: Exponent of the decay of the spectrum at shorter wavelengths. Larger is smoother.

    Returns:
        Field with mean 0 and standard deviation 1.
    """
    white = np.fft.rfft2(rng.standard_normal(shape, np.float32))
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    white *= (1 + (frequency * length) ** 2) ** (-power / 2)
    white[0, 0] = 0
    field = np.fft.irfft2(white, shape)
    return (field / field.std()).astype(np.float32)


def _lowest(field: Floats, among: npt.NDArray[np.bool_], fraction: float) -> npt.NDArray[np.bool_]:
    """Select the pixels of *among* with the lowest values, up to a fraction of all pixels."""
    count = min(round(fraction * field.size), int(among.sum()))
    if count == 0:
        return np.zeros_like(among)
    threshold = np.partition(field[among], count - 1)[count - 1]
    return among & (field <= threshold)


def _rotated(rows: Floats, cols: Floats, angle: npt.ArrayLike) -> tuple[Floats, Floats]:
    cos, sin = np.cos(angle), np.sin(angle)
    return (cols * cos + rows * sin).astype(np.float32), (rows * cos - cols * sin).astype(
        np.float32
    )


class _Painter:
    """Draws the ground of a region of interest, one kind of land after another."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int]) -> None:
        self.rng = rng
        self.shape = shape
        self.scale = min(1.0, min(shape) / _REFERENCE)
        self.rows, self.cols = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
        self.surface = np.full(shape, -1)
        self.piece = np.zeros(shape, np.int64)
        # Hedges have a surface of their own but the land cover of their field.
        self.hedge = np.zeros(shape, bool)
        self.stripes = np.zeros(shape, np.float32)
        self.relief = smooth_noise(rng, shape, _RELIEF * self.scale)

    @property
    def free(self) -> npt.NDArray[np.bool_]:
        return self.surface < 0

    def noise(self, length: float, power: float = 3.0) -> Floats:
        return smooth_noise(self.rng, self.shape, length * self.scale, power)

    def paint(self, where: npt.NDArray[np.bool_], name: str) -> None:
        self.surface[where & self.free] = surface_index(name)

    def water(self) -> None:
        """Paint lakes in the hollows, and a meandering river."""
        self.paint(_lowest(self.relief, self.free, self.rng.uniform(0.07, 0.14)), 'water')
        across, along = _rotated(self.rows, self.cols, self.rng.uniform(0, np.pi))
        # Meanders: displace a straight line by smooth noise and by waves.
        across -= np.median(across)
        across += 34 * self.scale * self.noise(130)
        across += 22 * self.scale * np.sin(along / (38 * self.scale) + self.rng.uniform(0, 6))
        width = self.rng.uniform(2.5, 5.0) * (1 + 0.25 * self.noise(80))
        self.paint(np.abs(across) < np.maximum(width, 1.2) * max(self.scale, 0.5), 'water')

    def wetland(self) -> None:
        """Paint marsh and swamp forest on low ground."""
        low = 0.4 * self.relief + self.noise(_RELIEF)
        wet = _lowest(low, self.free, self.rng.uniform(0.09, 0.14))
        swamp = self.noise(130) > 0
        self.paint(wet & swamp, 'swamp forest')
        self.paint(wet, 'marsh')

    def heights(self) -> None:
        """Paint bare rock and sand on the highest ground."""
        high = -self.relief + 0.35 * self.noise(60, 2.5)
        bare = _lowest(high, self.free, self.rng.uniform(0.08, 0.13))
        rock = self.noise(170) > self.rng.uniform(-0.7, 0.7)
        self.paint(bare & rock, 'rock')
        self.paint(bare, 'sand')

    def town(self) -> None:
        """Paint a town with a grid of streets whose blocks are divided into houses and gardens."""
        free = np.argwhere(self.free)
        row, col = free[self.rng.integers(len(free))]
        distance = np.hypot(self.rows - row, self.cols - col) / (_DISTRICT * self.scale)
        town = _lowest(distance + 0.25 * self.noise(60), self.free, self.rng.uniform(0.07, 0.12))
        u, v = _rotated(self.rows, self.cols, self.rng.uniform(0, np.pi / 2))
        u += 2 * self.noise(120)
        v += 2 * self.noise(120)
        block = self.rng.uniform(9, 14), self.rng.uniform(9, 14)
        street = (np.mod(u, block[0]) < 1.7) | (np.mod(v, block[1]) < 1.7)
        plot = np.floor(u / 3.1).astype(np.int64) * _FIELDS + np.floor(v / 3.1).astype(np.int64)
        plots, index = np.unique(plot, return_inverse=True)
        built = (self.rng.random(len(plots)) < self.rng.uniform(0.6, 0.8))[index]
        self.piece[town] = index.reshape(self.shape)[town]
        self.paint(town & street, 'street')
        self.paint(town & built.reshape(self.shape), 'roofs')
        self.paint(town, 'gardens')

    def forest(self) -> None:
        """Paint woods with natural edges, with conifers on higher ground."""
        woods = _lowest(self.noise(140, 2.7), self.free, self.rng.uniform(0.13, 0.2))
        conifers = self.relief + 0.6 * self.noise(100) > self.rng.uniform(-0.3, 0.6)
        self.paint(woods & conifers, 'conifers')
        self.paint(woods, 'broad-leaved forest')

    def farmland(self) -> None:
        """Paint fields in districts, each with an orientation, a field size and a main use."""
        district = self._districts()
        count = int(district.max()) + 1
        angle = self.rng.uniform(0, np.pi, count)
        u, v = _rotated(self.rows, self.cols, angle[district])
        height = self.rng.uniform(13, 26, count)[district] * max(self.scale, 0.5)
        width = height * self.rng.uniform(1.2, 3.0, count)[district]
        strip = np.floor(v / height)
        u += width * np.mod(strip * 0.381966, 1)  # fields of neighbouring strips are staggered
        number = np.stack([strip, np.floor(u / width)]).astype(np.int64) + _FIELDS // 2
        field = (district * _FIELDS + number[0]) * _FIELDS + number[1]
        fields, index = np.unique(field, return_inverse=True)
        index = index.reshape(self.shape)
        land = self.free
        use = self._uses(count, fields // _FIELDS**2)
        kind = _FIELD_SURFACES[use, (self.rng.random(len(fields)) < 0.4).astype(int)]
        self.surface[land] = kind[index][land]
        self.piece[land] = index[land]
        edge = np.minimum(np.mod(v, height), np.mod(u, width)) < 1.0
        self.hedge = land & edge & (self.rng.random(count) < 0.6)[district]
        # Crop rows and tramlines run along a field.
        crops = land & (use < 2)[index]
        self.stripes[crops] = np.sin(2 * np.pi * v / 3.6)[crops]

    def _districts(self) -> Ints:
        # Imported here, as only the generation of samples needs it.
        from scipy.spatial import cKDTree

        step = _DISTRICT * self.scale
        grid = [np.arange(-0.5, n / step + 1) for n in self.shape]
        points = np.stack(np.meshgrid(*grid, indexing='ij'), -1).reshape(-1, 2)
        points = (points + self.rng.uniform(-0.35, 0.35, points.shape)) * step
        warp = 8 * self.scale
        pixels = np.stack(
            [self.rows + warp * self.noise(60), self.cols + warp * self.noise(60)], -1
        )
        _, nearest = cKDTree(points).query(pixels.reshape(-1, 2))
        return np.asarray(nearest, np.int64).reshape(self.shape)

    def _uses(self, count: int, district: Ints) -> Ints:
        """Return the use of each field, given its district: a row of `_FIELD_SURFACES`."""
        of_district = self.rng.permutation(np.arange(count) % len(_FIELD_SURFACES))
        use = of_district[district]
        # One field in seven has another use than its district.
        other = self.rng.random(len(use)) < 0.14
        return np.where(other, self.rng.integers(0, len(_FIELD_SURFACES), len(use)), use)

    def _slope(self) -> Floats:
        rise = np.gradient(self.relief + 0.15 * self.noise(60), axis=0)
        rise[self.surface == surface_index('water')] = 0
        return (-rise / rise.std()).astype(np.float32)

    def finish(self) -> Landscape:
        """Add textures, and draw the properties of the units."""
        land_cover = surface_classes()[self.surface]
        surface = np.where(self.hedge, surface_index('broad-leaved forest'), self.surface)
        keys, unit = np.unique(self.piece * len(SURFACES) + surface, return_inverse=True)
        unit = unit.reshape(self.shape)
        kind = keys % len(SURFACES)
        crop = np.isin(kind, _FIELD_SURFACES[:2])
        managed = np.isin(kind, [*_FIELD_SURFACES.flat, surface_index('roofs')])
        delay = self.rng.normal(0, 9, len(kind)) * crop
        gain = np.exp(self.rng.normal(0, 0.09, len(kind)) * managed)
        grain = self.noise(0) * surface_values('grain')[surface] + 0.035 * self.stripes
        speckled = 0.6 * self.noise(9, 2) + 0.8 * self.noise(40, 2)
        vigour = speckled * surface_values('mottle')[surface]
        rough = 0.7 * self.noise(0) + 0.7 * self.noise(12, 2)
        backscatter = rough * surface_values('roughness')[surface]
        # Building corners that face the radar are much brighter than anything else.
        corners = (surface == surface_index('roofs')) & (self.rng.random(self.shape) < 0.06)
        backscatter = backscatter + corners * self.rng.uniform(6, 18, self.shape)
        return Landscape(
            land_cover=land_cover,
            unit=unit,
            surface=kind,
            delay=delay.astype(np.float32),
            gain=gain.astype(np.float32),
            brightness=grain.astype(np.float32),
            vigour=vigour.astype(np.float32),
            backscatter=backscatter.astype(np.float32),
            slope=self._slope(),
            elevation=(_MEAN_ELEVATION + _ELEVATION_RANGE * self.relief).astype(np.float32),
        )


def draw_landscape(rng: np.random.Generator, shape: tuple[int, int]) -> Landscape:
    """Draw the ground of a region of interest.

    Args:
        rng: Random generator. The same state gives the same landscape.
        shape: Height and width in pixels of 10 m.

    Returns:
        The landscape.
    """
    painter = _Painter(rng, shape)
    painter.water()
    painter.wetland()
    painter.heights()
    painter.town()
    painter.forest()
    painter.farmland()
    return painter.finish()
