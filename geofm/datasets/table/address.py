"""Addresses of rasters in a table: files, parts of files, and remote files."""

import os
import re

#: GDAL subdataset: format, file, and part of the file.
_SUBDATASET = re.compile(r'(netcdf|hdf5|zarr):(?:"([^"]+)"|([^":]+))(:.+)?', re.IGNORECASE)

_ARCHIVE = re.compile(r'/vsi(zip|tar|gzip)/(?!/)(.+)', re.IGNORECASE)

#: The slash distinguishes a URL from a file name with a colon. pathlib merges two slashes into one.
_SCHEME = re.compile(r'[a-z][a-z0-9+.-]+:/|/vsi', re.IGNORECASE)


def resolve(path: str, root: str) -> str:
    """Make a path of a table absolute.

    Args:
        path: A path that is absolute or relative to the folder of the table; a file in an archive,
            ``/vsizip/archive.zip/scene.tif`` (with two slashes before an absolute path, as in
            GDAL); a part of a container, ``NETCDF:"file.nc":B02``; or a URL, ``https://...``,
            ``s3://...`` or ``/vsi...``.
        root: Folder of the table.

    Returns:
        The absolute path or address.
    """
    if match := _ARCHIVE.match(path):
        return f'/vsi{match[1].lower()}/{os.path.join(root, match[2])}'  # noqa: PTH118 - hot
    if match := _SUBDATASET.fullmatch(path):
        file = os.path.join(root, match[2] or match[3])  # noqa: PTH118 - hot
        return f'{match[1]}:"{file}"{match[4] or ""}'
    if _SCHEME.match(path):
        return path
    return os.path.join(root, path)  # noqa: PTH118 - hot


def relative(path: str, old: str, new: str) -> str:
    """Convert a path of a table for a table in another folder.

    Args:
        path: The path, as described in :func:`resolve`.
        old: Absolute folder of the old table.
        new: Absolute folder of the new table.

    Returns:
        A path relative to *new* if the file is in that folder or below, else the absolute path.
    """
    if old == new:
        return path
    whole = resolve(path, old)
    prefix = new.rstrip('/') + '/'
    if whole.startswith(prefix):
        return whole[len(prefix) :]
    if match := re.match(r'(/vsi(?:zip|tar|gzip)/|\w+:")', whole):
        return match[0] + whole[match.end() :].removeprefix(prefix)
    return whole


def file_of(address: str) -> str | None:
    """Return the local file that an address needs.

    Args:
        address: Address as returned by :func:`resolve`.

    Returns:
        The file. For a file in an archive, it is the archive: the first part of the path that is
        not a folder. None for remote files.
    """
    if match := _SUBDATASET.fullmatch(address):
        return match[2] or match[3]
    if match := re.match(r'/vsi(?:zip|tar|gzip)/(/.*)', address, re.IGNORECASE):
        return _archive(match[1])
    return None if _SCHEME.match(address) else address


def _archive(path: str) -> str:
    """Return the archive in a path that leads into it."""
    parts = path.split('/')
    for i in range(2, len(parts) + 1):
        start = '/'.join(parts[:i])
        if not os.path.isdir(start):  # noqa: PTH112
            return start
    return path
