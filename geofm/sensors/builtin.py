"""Definitions of the built-in sensors."""

from geofm.sensors.sensor import Band, Drawing, Histogram, Sensor, SensorPhotometry

_DN_TYPES = ('uint16', 'int16', 'uint32', 'int32')

# Bands of Sentinel-2: central wavelength in µm and ground sample distance in m of Sentinel-2A,
# common name, and aliases in STAC catalogues and torchgeo-bench. Then mean and standard deviation
# in DN of Level-1C (top-of-atmosphere reflectance x 10,000) in SEN12MS-CR-TS (Ebel et al., 2022);
# and of Level-2A in TerraMesh, over 9 million samples worldwide, as published with TerraMind
# (Jakubik et al., 2025). BigEarthNet v1, with clear images of European summers, has other means of
# Level-2A (in the patches of the tests B02 411, B08 3,626) and smaller deviations.
_MSI = (
    ('B01', 0.443, 60.0, 'coastal', 'coastal_aerosol', (3036.0, 2323.0), (1390.5, 2106.8)),
    ('B02', 0.493, 10.0, 'blue', '', (2842.0, 2350.0), (1503.3, 2141.1)),
    ('B03', 0.560, 10.0, 'green', '', (2683.0, 2206.0), (1718.2, 2039.0)),
    ('B04', 0.665, 10.0, 'red', '', (2866.0, 2378.0), (1853.9, 2134.1)),
    ('B05', 0.704, 20.0, 'rededge071', 'rededge1 red_edge_1', (3013.0, 2328.0), (2199.1, 2085.3)),
    ('B06', 0.741, 20.0, 'rededge075', 'rededge2 red_edge_2', (3429.0, 2206.0), (2780.0, 1889.9)),
    ('B07', 0.783, 20.0, 'rededge078', 'rededge3 red_edge_3', (3684.0, 2217.0), (2987.0, 1820.3)),
    ('B08', 0.833, 10.0, 'nir', '', (3556.0, 2145.0), (3083.2, 1871.9)),
    ('B8A', 0.865, 20.0, 'nir08', 'red_edge_4', (3840.0, 2200.0), (3132.2, 1753.8)),
    ('B09', 0.945, 60.0, 'nir09', 'water_vapour', (1689.0, 1551.0), (3163.0, 1797.4)),
    ('B10', 1.374, 60.0, 'cirrus', 'swir_cirrus', (312.0, 694.0), None),
    ('B11', 1.614, 20.0, 'swir16', 'swir_1', (2733.0, 1365.0), (2424.9, 1434.3)),
    ('B12', 2.202, 20.0, 'swir22', 'swir_2', (2098.0, 1159.0), (1857.6, 1334.3)),
)


def _msi(level: int) -> tuple[Band, ...]:
    """Make the bands of Sentinel-2 of a processing level. Files may write B1 for B01."""
    bands = []
    for name, wavelength, gsd, common_name, aliases, *statistics in _MSI:
        if (known := statistics[level - 1]) is not None:
            short = (f'B{name[2:]}',) if name.startswith('B0') else ()
            bands.append(
                Band(name, *known, common_name, wavelength, gsd, (*short, *aliases.split()))
            )
    return tuple(bands)


# Means and standard deviations of SEN12MS-CR-TS in dB.
SENTINEL1 = Sensor(
    's1',
    'Sentinel-1 GRD',
    (Band('VV', -11.4, 4.60, gsd=10.0), Band('VH', -19.2, 6.30, gsd=10.0)),
    'backscatter',
    'dB',
    # Thermal noise is near -30 dB, and corner reflectors are near 30 dB. Processors may clip power
    # at 1e-10.
    limits=(-100.0, 100.0),
    measures_zero=False,
    dtypes=('float32', 'float64'),
    photometry=SensorPhotometry(
        offset=(-1.5, 1.5),
        band_offset=(-0.5, 0.5),
        looks=(4.0, 32.0),
        # Equivalent to mild multilooking. More would remove point targets as well as speckle.
        blur=(0.1, 1.0),
    ),
    histogram=Histogram(-100.0, 0.01, 15_000),
    drawing=Drawing(('VV', 'VH', 'VV - VH'), 'VV, VH, VV − VH'),
    qualified=False,
)
SENTINEL2 = Sensor(
    's2',
    'Sentinel-2 Level-1C',
    _msi(1),
    'reflectance',
    'DN',
    scale=1e-4,
    # After subtraction of the offset of processing baseline 04.00, dark pixels may be -1,000.
    limits=(-1000.0, 65535.0),
    measures_zero=True,
    dtypes=_DN_TYPES,
    baseline_offset=1000.0,
    photometry=SensorPhotometry(
        gain=(0.8, 1.2), band_gain=(0.95, 1.05), offset=(0.0, 0.03), blur=(0.1, 2.0)
    ),
    histogram=Histogram(0.0, 1.0, 65_536),
    qualified=False,
    grid_priority=1,
)

SENTINEL2_L2A = Sensor(
    's2l2a',
    'Sentinel-2 Level-2A',
    _msi(2),
    'reflectance',
    'DN',
    scale=1e-4,
    limits=(-1000.0, 65535.0),
    measures_zero=True,
    dtypes=_DN_TYPES,
    baseline_offset=1000.0,
    grid_priority=1,
)


def _oli(name: str, mean: float, std: float, common_name: str, wavelength: float) -> Band:
    """Make a band of Landsat from statistics of reflectance x 10,000."""
    number = name[2:]
    scale, offset = 2.75e-5, -0.2
    return Band(
        name,
        round((mean / 10_000 - offset) / scale, 1),
        round(std / 10_000 / scale, 1),
        common_name,
        wavelength,
        30.0,
        (f'B{number}', f'SR_B{number}'),
    )


# Level-2 surface reflectance of Collection 2: DN x 0.0000275 - 0.2, with 0 as fill value. Means and
# standard deviations of B02 to B07 are those of Harmonized Landsat Sentinel-2 over the contiguous
# United States, as published with Prithvi-EO-1.0 (Jakubik et al., 2023), converted to this scale.
# B01 uses those of B02. The thermal bands B10 and B11 measure another quantity, surface
# temperature, and are left out; they can be defined as a further sensor.
LANDSAT = Sensor(
    'landsat',
    'Landsat 8/9 Level-2',
    (
        _oli('B01', 775.2, 1281.5, 'coastal', 0.443),
        _oli('B02', 775.2, 1281.5, 'blue', 0.482),
        _oli('B03', 1081.0, 1270.0, 'green', 0.561),
        _oli('B04', 1228.6, 1399.5, 'red', 0.655),
        _oli('B05', 2497.2, 1368.3, 'nir08', 0.865),
        _oli('B06', 2204.2, 1291.7, 'swir16', 1.609),
        _oli('B07', 1610.8, 1154.5, 'swir22', 2.201),
    ),
    'reflectance',
    'DN',
    scale=2.75e-5,
    offset=-0.2,
    limits=(1.0, 65535.0),
    measures_zero=False,
    nodata=(0.0,),
    dtypes=('uint16', 'int32', 'uint32'),
)

# Mean and standard deviation of the Copernicus DEM in TerraMesh, as published with TerraMind.
DEM = Sensor(
    'dem',
    'Elevation',
    (Band('elevation', 670.7, 951.3, gsd=30.0, aliases=('dem', 'dsm', 'dtm', 'height', 'z')),),
    'elevation',
    'm',
    nodata=(-32768.0, -32767.0, -9999.0),
    static=True,
)

# Mean and standard deviation of ImageNet x 255.
RGB = Sensor(
    'rgb',
    'RGB picture',
    (
        Band('red', 123.7, 58.4, 'red', 0.65, aliases=('R',)),
        Band('green', 116.3, 57.1, 'green', 0.55, aliases=('G',)),
        Band('blue', 103.5, 57.4, 'blue', 0.45, aliases=('B',)),
    ),
    'image',
    '8-bit',
    dtypes=('uint8',),
)

#: Built-in sensors in canonical order.
BUILTIN = (SENTINEL1, SENTINEL2, SENTINEL2_L2A, LANDSAT, DEM, RGB)
