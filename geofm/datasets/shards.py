"""Shards, large files of many samples each, in the format of litdata.

A sample is a contiguous range of bytes in a shard, so that reading it takes one request. Reading a
sample of an archive takes a request per file, with one file per sensor or even per band.
"""

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets.utils import Sample

from geofm.atomic import atomic_folder
from geofm.datasets.archive.dataset import RasterArchive
from geofm.datasets.pairs.reading import BrokenFileError
from geofm.datasets.seeded import Seeded
from geofm.sensors import sensor_channels

#: Data types, from small to large, in which an image may be stored without loss.
_NARROW = (torch.uint8, torch.uint16, torch.int16)

#: Prefix of the names of tensors with the pixels of a sensor.
_PIXELS = 'image.'

#: Size of a shard in bytes, unless a sample is larger.
SHARD_BYTES = 64 * 2**20

#: Number of requests of a process to a server at the same time.
_REQUESTS = 8

#: File that lists the shards of a folder.
INDEX = 'index.json'

#: Size of an offset in a shard in bytes.
_UINT32 = 4

_NO_LIBRARY = "shards need the library {}: pip install 'geofm[shards]'"


class ShardError(ValueError):
    """A folder of shards cannot be used."""


@dataclass(frozen=True)
class Contents:
    """Metadata shared by all samples of shards.

    Attributes:
        bands: Names of the channels of 'image'.
        sensors: Keys of the sensors, in the order of 'present'.
    """

    bands: tuple[str, ...]
    sensors: tuple[str, ...]


def pack(sample: Sample, contents: Contents, files: Iterable[str | Path] = ()) -> bytes:
    """Serialise a sample in the format of safetensors.

    Args:
        sample: Tensors by name, with 'image' float32 (C, H, W). The pixels of each sensor are
            stored in the smallest data type that represents them exactly.
        contents: Metadata of all samples.
        files: Files that the sample was read from.

    Returns:
        The bytes.
    """
    tensors = {key: value.contiguous() for key, value in sample.items() if key != 'image'}
    for key, channels in sensor_channels(contents.bands).items():
        tensors[_PIXELS + key] = _narrowed(sample['image'][channels])
    about = {
        'bands': contents.bands,
        'sensors': contents.sensors,
        'files': [str(file) for file in files],
    }
    return save(tensors, {'geofm': json.dumps(about)})


def unpack(content: bytes) -> Sample:
    """Restore a sample from the bytes of :func:`pack`, bit for bit.

    Args:
        content: The bytes.

    Returns:
        The sample.

    Raises:
        ShardError: If the bytes are not a sample.
    """
    bands = _about(content)['bands']
    sample = load(content)
    pixels = {key: sample.pop(_PIXELS + key) for key in sensor_channels(bands)}
    shape = next(iter(pixels.values())).shape[1:]
    image = torch.empty((len(bands), *shape))
    for key, channels in sensor_channels(bands).items():
        image[channels] = pixels[key].float()
    return {'image': image, **sample}


def _narrowed(pixels: Tensor) -> Tensor:
    """Convert pixels to the smallest data type that represents them exactly."""
    for dtype in _NARROW:
        narrow = pixels.to(torch.int32).to(dtype) if pixels.isfinite().all() else None
        # Compare bits, as -0.0 equals 0.0.
        if narrow is not None and torch.equal(
            narrow.float().view(torch.int32), pixels.contiguous().view(torch.int32)
        ):
            return narrow.contiguous()
    return pixels.contiguous()


def _about(content: bytes) -> dict[str, Any]:
    """Return the metadata of a sample."""
    try:
        length = int.from_bytes(content[:8], 'little')
        header = json.loads(content[8 : 8 + length])
        about: dict[str, Any] = json.loads(header['__metadata__']['geofm'])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError("not a sample written by 'geofm shard'") from error
    return about


class Shards(Dataset[Sample]):
    """Samples of shards that ``geofm shard`` has written.

    The samples are those of the archive that the shards were written from, bit for bit and in the
    same order. Each process opens the shards separately. Workers that read from a URL must be
    started with forkserver or spawn, as :class:`geofm.datamodules.ShardsDataModule` does.

    Attributes:
        root: Folder of the shards.
    """

    def __init__(self, root: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Initialize a new Shards instance.

        Args:
            root: Folder of the shards: a path, or a URL that starts with ``s3://``, ``gs://``,
                ``az://``, ``http://`` or ``https://``.
            storage_options: Keyword arguments of ``obstore.store.from_url``, e.g. ``{'config':
                {'endpoint': ...}}``. Credentials default to those of the environment.

        Raises:
            ModuleNotFoundError: If *root* is a URL and the extra ``shards`` is not installed.
            ShardError: If the folder has no shards written by ``geofm shard``.
        """
        self.root = root
        self.storage_options = dict(storage_options or {})
        self._reader: tuple[int, _Reader] | None = None
        # This reader is not kept, as forked workers must not inherit its connections.
        opened = _Reader(root, self.storage_options)
        self._length = len(opened)
        try:
            about = _about(opened.read(0))
        except Exception as error:
            raise ShardError(f'{root}: not written by `geofm shard` ({error})') from error
        self.contents = Contents(tuple(about['bands']), tuple(about['sensors']))

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the channels of 'image'."""
        return self.contents.bands

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_reader': None}

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample.

        Returns:
            The sample, see :meth:`geofm.datasets.RasterArchive.read_pair`.

        Raises:
            IndexError: If there is no such sample.
            ShardError: If it cannot be read.
        """
        return {**unpack(self._bytes(index)), 'index': torch.tensor(index.__index__())}

    def files_of(self, index: SupportsIndex) -> list[Path]:
        """Return the files that a sample was read from when the shards were written.

        Args:
            index: Index of the sample.

        Returns:
            Their paths.
        """
        return [Path(file) for file in _about(self._bytes(index))['files']]

    def read_ahead(self, indices: Sequence[SupportsIndex]) -> None:
        """Request the samples of a batch from a server at the same time.

        :class:`~geofm.datasets.Seeded` calls this before it reads a batch, so that the latency of
        the server is paid once per batch and not once per sample. Local files are not affected.

        Args:
            indices: Indices of the samples.

        Raises:
            IndexError: If there is no such sample.
        """
        self._opened().read_ahead([self._position(index) for index in indices])

    def _position(self, index: SupportsIndex) -> int:
        """Return an index that is not negative."""
        position = index.__index__()
        if not -len(self) <= position < len(self):
            raise IndexError(f'sample {position} of {len(self)}: out of range')
        return position % len(self)

    def _opened(self) -> '_Reader':
        """Return the reader of this process."""
        if self._reader is None or self._reader[0] != os.getpid():
            try:
                self._reader = os.getpid(), _Reader(self.root, self.storage_options)
            except RuntimeError as error:
                raise ShardError(f'{self.root} cannot be read ({error})') from error
        return self._reader[1]

    def _bytes(self, index: SupportsIndex) -> bytes:
        """Return the bytes of a sample."""
        position, reader = self._position(index), self._opened()
        try:
            return reader.read(position)
        except Exception as error:
            raise ShardError(f'{self.root}: sample {position} cannot be read ({error})') from error


class _Folder:
    """Byte ranges of the files of a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, file: str, start: int = 0, end: int | None = None) -> bytes:
        """Read a file from byte *start* up to, not including, *end*."""
        with (self.root / file).open('rb') as stream:
            stream.seek(start)
            return stream.read(-1 if end is None else end - start)


class _ObjectStore:
    """Byte ranges of the objects below a URL."""

    #: ID of the process in which obstore runs. Its threads do not survive a fork.
    process: ClassVar[int | None] = None

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        if _ObjectStore.process not in (None, os.getpid()):
            raise RuntimeError(
                'a forked process cannot read object storage after its parent has: start workers '
                'by forkserver or spawn'
            )
        _ObjectStore.process = os.getpid()
        self.obstore = _obstore()
        self.store = self.obstore.store.from_url(url, **options)

    def read(self, file: str, start: int = 0, end: int | None = None) -> bytes:
        """Read an object from byte *start* up to, not including, *end*."""
        if end is None:
            return bytes(self.obstore.get(self.store, file).bytes())
        return bytes(self.obstore.get_range(self.store, file, start=start, end=end))


class _Reader:
    """Reader of litdata's binary files that makes one ranged read per sample.

    A file starts with the number of its samples and their offsets, all of them uint32. This reader
    keeps the offsets of a file, while that of litdata reads them again for each sample.
    """

    def __init__(self, root: str, storage_options: Mapping[str, Any]) -> None:
        """Read the index.

        Raises:
            ModuleNotFoundError: If *root* is a URL and the extra ``shards`` is not installed.
            ShardError: If there is no index, or it has another format.
        """
        try:
            self._files = (
                _ObjectStore(root, storage_options) if is_remote(root) else _Folder(Path(root))
            )
            index = json.loads(self._files.read(INDEX))
            config, chunks = index['config'], index['chunks']
            self._names = [str(chunk['filename']) for chunk in chunks]
            self._ends = np.cumsum([int(chunk['chunk_size']) for chunk in chunks])
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ShardError(
                f'{root}: no shards found ({error}); write them with `geofm shard`'
            ) from error
        plain = not config.get('compression') and not config.get('encryption')
        if config.get('data_format') != ['bytes'] or not plain or not self._names:
            raise ShardError(f'{root}: not written by `geofm shard` (the litdata format differs)')
        for name in self._names:
            if Path(name).name != name:
                raise ShardError(f'{root}: {INDEX} names {name!r}, which is not in the folder')
        self._offsets: dict[int, np.ndarray] = {}
        self._locks = [threading.Lock() for _ in self._names]
        self._threads = ThreadPoolExecutor(_REQUESTS) if is_remote(root) else None
        self._ahead: dict[int, Future[bytes]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Start to read samples in threads; those of the last call are dropped."""
        if self._threads is not None:
            for waiting in self._ahead.values():
                waiting.cancel()
            self._ahead = {i: self._threads.submit(self._read, i) for i in indices}

    def read(self, index: int) -> bytes:
        """Read the bytes of a sample by its index."""
        ahead = self._ahead.pop(index, None)
        return self._read(index) if ahead is None else ahead.result()

    def _read(self, index: int) -> bytes:
        number = int(np.searchsorted(self._ends, index, side='right'))
        first = int(self._ends[number - 1]) if number else 0
        count = int(self._ends[number]) - first
        with self._locks[number]:
            if number not in self._offsets:
                header = self._range(number, _UINT32, _UINT32 * (2 + count))
                self._offsets[number] = np.frombuffer(header, '<u4').astype(np.int64)
        start, end = self._offsets[number][index - first : index - first + 2].tolist()
        # litdata writes the number of bytes before the bytes.
        return self._range(number, start + _UINT32, end)

    def _range(self, number: int, start: int, end: int) -> bytes:
        """Read a shard from byte *start* up to, not including, *end*."""
        content = self._files.read(self._names[number], start, end)
        if len(content) != end - start:
            raise ShardError(f'{self._names[number]} ends before byte {end}')
        return content


def is_remote(root: str) -> bool:
    """Check whether a folder of shards is a URL and not a path."""
    return '://' in root


def _obstore() -> Any:
    """Import obstore, which is an optional dependency."""
    try:
        import obstore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NO_LIBRARY.format('obstore')) from error
    return obstore


def _litdata() -> Any:
    """Import litdata, which is an optional dependency and takes a second to import."""
    try:
        import litdata
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NO_LIBRARY.format('litdata')) from error
    return litdata


class _Packed(Dataset[Any]):
    """Bytes of the samples of an archive, or the error message if one cannot be read."""

    def __init__(self, archive: RasterArchive) -> None:
        self.archive = archive
        self.contents = Contents(archive.bands, archive.sensors)

    def __len__(self) -> int:
        return len(self.archive)

    def __getitem__(self, index: int) -> bytes | str:
        try:
            sample = self.archive.read_or_raise(index)
        except BrokenFileError as error:
            return str(error)
        return pack(sample, self.contents, self.archive.files_of(index))


def write_shards(
    archive: RasterArchive, folder: Path, num_workers: int = 0, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write the samples of an archive as shards, in order.

    Args:
        archive: The archive.
        folder: Folder to write. It is written atomically.
        num_workers: Number of processes that read the archive. The shards do not depend on it.
        shard_bytes: Size of a shard in bytes.

    Returns:
        The error messages of samples that cannot be read and are left out.

    Raises:
        FileExistsError: If the folder exists and is not empty.
        ModuleNotFoundError: If litdata is not installed.
        ShardError: If no sample can be read.
    """
    _litdata()
    from litdata.streaming.writer import BinaryWriter

    errors: list[str] = []
    loader = DataLoader(Seeded(_Packed(archive)), batch_size=None, num_workers=num_workers)
    with atomic_folder(folder) as part:
        writer = BinaryWriter(str(part), chunk_bytes=shard_bytes)
        count = 0
        for packed in track(loader, f'Writing {folder.name}', len(archive)):
            if isinstance(packed, str):
                errors.append(packed)
                continue
            writer[count] = packed
            count += 1
        if not count:
            raise ShardError(f'no sample can be read, e.g. {errors[0]}')
        writer.done()
        writer.merge()
    return errors


def upload_shards(folder: Path, url: str) -> None:
    """Copy shards to object storage, and the index last, so that partial copies are not usable.

    Args:
        folder: Folder of the shards.
        url: URL of the destination folder, e.g. ``s3://bucket/shards/train``. Credentials are taken
            from the environment by obstore.
    """
    obstore = _obstore()
    store = obstore.store.from_url(url)
    files = sorted(folder.iterdir(), key=lambda file: (file.name == INDEX, file.name))
    for file in track(files, f'Uploading {folder.name}'):
        obstore.put(store, file.name, file)
