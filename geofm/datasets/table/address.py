"""Addresses of rasters in a table: files, parts of files, and files on servers."""

import os
import re

#: A GDAL subdataset: format, file, and what of it.
_SUBDATASET = re.compile(r'(netcdf|hdf5|zarr):(?:"([^"]+)"|([^":]+))(:.+)?', re.IGNORECASE)

_ARCHIVE = re.compile(r'/vsi(zip|tar|gzip)/(?!/)(.+)', re.IGNORECASE)

#: The slash tells an address from a file whose name has a colon; of two, pathlib keeps one.
_SCHEME = re.compile(r'[a-z][a-z0-9+.-]+:/|/vsi', re.IGNORECASE)


def resolve(path: str, root: str) -> str:
    """Make a path of a table absolute.

    Args:
        path: A path relative to the table's folder or absolute; a file in an archive,
            ``/vsizip/archive.zip/scene.tif`` (two slashes before an absolute path, as in GDAL); a
            part of a container, ``NETCDF:"file.nc":B02``; or an address, ``https://...``,
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
    """Make a path of a table fit for a table in another folder.

    Args:
        path: The path, as of :func:`resolve`.
        old: Absolute folder that it is relative to.
        new: Absolute folder of the new table.

    Returns:
        A path relative to *new* if the file is there or below, else the absolute path.
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
    """File on this machine that an address needs.

    Args:
        address: Address as of :func:`resolve`.

    Returns:
        The file, or for one in an archive the first part of its path that is not a folder; None if
        it is on a server.
    """
    if match := _SUBDATASET.fullmatch(address):
        return match[2] or match[3]
    if match := re.match(r'/vsi(?:zip|tar|gzip)/(/.*)', address, re.IGNORECASE):
        return _archive(match[1])
    return None if _SCHEME.match(address) else address


def _archive(path: str) -> str:
    """The archive in a path that leads into it."""
    parts = path.split('/')
    for i in range(2, len(parts) + 1):
        start = '/'.join(parts[:i])
        if not os.path.isdir(start):  # noqa: PTH112
            return start
    return path
