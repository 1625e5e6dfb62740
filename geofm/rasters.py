"""Opening raster files that may come from anywhere: the one way, for data sets and for maps.

GDAL chooses a format by what is in a file, whatever its name. A ``.tif`` may thus be a virtual
raster, which reads other files and addresses, and a file of a kilobyte may ask for gigabytes of
memory. :func:`open_raster` allows for formats that hold their own pixels, on this machine only, and
for blocks that fit the file.
"""

import math
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from rasterio._err import CPLE_BaseError
from rasterio.env import ensure_env
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.io import DatasetReader

#: Formats that hold their own pixels, by the names of GDAL's drivers.
DRIVERS = (
    'GTiff',
    'SNAP_TIFF',
    'JP2OpenJPEG',
    'JP2KAK',
    'JP2ECW',
    'ENVI',
    'HFA',
    'netCDF',
    'HDF5',
    'HDF5Image',
    'Zarr',
    'PNG',
    'JPEG',
)

#: What opening and reading a damaged file may raise. GDAL's own errors come through where rasterio
#: asks for details of a file, and have no public name.
RASTER_ERRORS = (RasterioError, CPLE_BaseError, OSError, ValueError)

#: Largest block (tile or strip, with all bands that are stored in it) of a small file, in bytes.
#: GDAL reads whole blocks, so a block must fit into memory even for a single pixel.
MAX_BLOCK_BYTES = 128 * 2**20

#: Largest block as a multiple of the file's size: beyond it, compression cannot explain the block.
MAX_EXPANSION = 8

_ARCHIVE = re.compile(r'(zip|tar|gzip):/{1,2}(.+?)!/*(.+)', re.IGNORECASE)
_VSI_ARCHIVE = re.compile(r'/vsi(zip|tar|gzip)/(.+)', re.IGNORECASE)
_SUBDATASET = re.compile(r'(netcdf|hdf5|zarr):(?:"([^"]+)"|([^":]+))(:.+)?', re.IGNORECASE)
_REMOTE = re.compile(
    r'([a-z][a-z0-9+]+:/{1,2}(?!/)(?=[^/])|/vsi(?!zip/|tar/|gzip/)|(wms|wmts|wcs|pg|eedai?|daas):)',
    re.IGNORECASE,
)


#: GDAL's prefixes of addresses of servers.
_SERVERS = {
    'https://': '/vsicurl/',
    'http://': '/vsicurl/',
    's3://': '/vsis3/',
    'gs://': '/vsigs/',
    'az://': '/vsiaz/',
}

#: Options of GDAL for servers: seconds, and numbers of tries.
_NETWORK = {
    'GDAL_HTTP_MAX_RETRY': '4',
    'GDAL_HTTP_RETRY_DELAY': '0.5',
    'GDAL_HTTP_RETRY_CODES': '429,500,502,503,504',
    'GDAL_HTTP_CONNECTTIMEOUT': '10',
    'GDAL_HTTP_TIMEOUT': '60',
}


@dataclass(frozen=True)
class Address:
    """Where a raster is: a file, or a part of one.

    Attributes:
        name: What GDAL opens.
        file: The file on disk that holds it.
        stem: Short name of the raster, without suffix, e.g. for names of files made from it.
        is_virtual: Whether the user names a GDAL virtual raster.
    """

    name: str
    file: Path
    stem: str
    is_virtual: bool

    @classmethod
    def parse(cls, path: str | os.PathLike[str], remote: bool = False) -> Self:
        """Understand a path or an address as GDAL and rasterio write it.

        Args:
            path: Path of a file; a file in an archive, ``zip://archive.zip!scene.tif`` or
                ``/vsizip/archive.zip/scene.tif`` (tar and gzip likewise); or a part of a container,
                ``NETCDF:"file.nc":B02``.
            remote: Whether it may be on a server, ``https://...`` or ``s3://...``.

        Returns:
            The address.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not on this machine.
        """
        text = re.sub(r'^file:/+', '/', os.fspath(path))
        if match := _ARCHIVE.fullmatch(text):
            # pathlib makes one slash of two.
            text = f'/vsi{match[1].lower()}/{match[2]}/{match[3]}'
        if match := _VSI_ARCHIVE.fullmatch(text):
            file, inner = _split_archive(match[2].replace('{', '').replace('}', ''))
            name = Path(inner or file)
            text = '/'.join(filter(None, (f'/vsi{match[1].lower()}', str(file), inner)))
        elif match := _SUBDATASET.fullmatch(text):
            file = Path(match[2] or match[3])
            variable = re.sub(r'\W+', '_', match[4] or '').strip('_')
            name = file.with_name('_'.join(filter(None, (file.stem, variable))) + file.suffix)
        elif remote and (name_there := _on_server(text)) is not None:
            last = Path(text.partition('?')[0])
            return cls(name_there, last, last.stem, False)
        elif _REMOTE.match(text):
            raise ValueError(f'{text}: not a file of this machine; download it first')
        else:
            file = name = Path(text)
        if not file.exists():
            raise FileNotFoundError(f'{file}: no such file')
        return cls(text, file, name.stem, name.suffix.lower() == '.vrt')


def _split_archive(text: str) -> tuple[Path, str]:
    """Archive and path inside it."""
    # Of the two slashes before an absolute path, pathlib keeps one.
    for path in (Path(text), Path('/', text)):
        for archive in (path, *path.parents):
            if archive.is_file():
                return archive, '' if archive == path else str(path.relative_to(archive))
    return Path(text), ''


def _on_server(address: str) -> str | None:
    """GDAL's name of a file on a server; None if it is not on one of a known kind."""
    if re.match(r'/vsi(curl|s3|gs|az)/', address):
        return address
    for scheme, prefix in _SERVERS.items():
        if address.lower().startswith(scheme):
            return prefix + (address if prefix == '/vsicurl/' else address[len(scheme) :])
    return None


def _prepare_network() -> None:
    """Let GDAL try again where a server does not answer; what the user has set stays."""
    for name, value in _NETWORK.items():
        os.environ.setdefault(name, value)


def open_raster(
    path: str | os.PathLike[str], overview_level: int | None = None, remote: bool = False
) -> DatasetReader:
    """Open a raster file of a format that holds its own pixels, with bounded memory.

    Args:
        path: What :meth:`Address.parse` understands. A GDAL virtual raster is opened only if its
            name ends in ``.vrt``: it may read any file or address that it names.
        overview_level: Overview to open in place of the raster, from 0 (the finest).
        remote: Whether it may be on a server (``https://``, ``s3://``, ``gs://``, ``az://``), of
            which only the parts are fetched that are read. Failed requests are tried again.

    Returns:
        The open raster; close it, or use it as a context manager.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not on this machine, of no format that is read, a container of several
            rasters, or has blocks that do not fit the file.
    """
    address = Address.parse(path, remote)
    is_remote = remote and _on_server(address.name) is not None
    if is_remote:
        _prepare_network()
    else:
        _check_sidecars(address)
    try:
        drivers = [*DRIVERS, *(['VRT'] if address.is_virtual else [])]
        src = _open(address.name, drivers, overview_level)
    except RasterioIOError as error:
        if is_remote:
            raise ValueError(
                f'{path}: cannot be read from the server ({error}); check the address, the network '
                'and your credentials'
            ) from error
        raise ValueError(f'{address.name}: {_why_not(address, error)}') from error
    try:
        if src.count == 0:
            raise ValueError(f'{address.name}: {_choose_from(src.subdatasets)}')
        if 'OVERVIEW_FILE' in src.tags(ns='OVERVIEWS'):
            raise ValueError(
                f'{address.name}: its metadata name another file as its overviews; remove the '
                'entry OVERVIEW_FILE'
            )
        _check_blocks(src, address)
    except ValueError:
        src.close()
        raise
    return src


@ensure_env  # type: ignore[untyped-decorator]
def _open(name: str, drivers: list[str], overview_level: int | None) -> DatasetReader:
    options = {} if overview_level is None else {'OVERVIEW_LEVEL': overview_level}
    # Unlike rasterio.open, this takes several drivers.
    return DatasetReader(name, driver=drivers, **options)


def _check_sidecars(address: Address) -> None:
    """Check files beside a raster that GDAL opens on its own, by whatever driver fits."""
    if str(address.file) != address.name:
        return
    for suffix in ('.msk', '.ovr'):
        sidecar = address.file.with_name(address.file.name + suffix)
        if sidecar.is_file():
            open_raster(sidecar).close()


def _check_blocks(src: DatasetReader, address: Address) -> None:
    """Refuse blocks that would take more memory than the file can explain."""
    if address.is_virtual:
        return
    size = address.file.stat().st_size if address.file.is_file() else 0
    allowed = max(MAX_BLOCK_BYTES, MAX_EXPANSION * size)
    together = src.count if str(src.interleaving).lower().endswith('pixel') else 1
    for (height, width), dtype in zip(src.block_shapes, src.dtypes, strict=True):
        bytes_ = math.prod((height, width, together, np.dtype(_dtype(dtype)).itemsize))
        if bytes_ > allowed:
            raise ValueError(
                f'{address.name}: {size:,} bytes, but its blocks of {width} x {height} px take '
                f'{bytes_:,} bytes of memory; damaged, or write it anew in tiles, e.g. with '
                '`rio convert --co TILED=YES`'
            )


def _dtype(name: str) -> str:
    """NumPy's name of a pixel type."""
    return {'complex_int16': 'complex64'}.get(name, name)


def _why_not(address: Address, error: Exception) -> str:
    """Why a file cannot be opened, and what to do."""
    file = address.file
    if file.is_dir():
        return 'a folder, not a raster; give a file in it'
    with file.open('rb') as stream:
        start = stream.read(4096)
    if b'<VRTDataset' in start:
        return (
            'a GDAL virtual raster (VRT), which may read other files and addresses; if you trust '
            'it, give it a name that ends in .vrt'
        )
    if zipfile.is_zipfile(file) and str(file) == address.name:
        return f'an archive; give a raster in it, as /vsizip/{file}/NAME.tif'
    return f'cannot be read as a raster ({", ".join(DRIVERS[:3])}, ...): {error}'


def _choose_from(parts: list[Any]) -> str:
    """What to do about a container of several rasters."""
    if not parts:
        return 'holds no raster'
    return (
        f'holds several rasters; give one of them: {", ".join(map(str, parts[:20]))}. To use '
        'several as bands, make one file of them, e.g. with `rio stack ... -o stacked.tif`'
    )
