"""Samples of shards compared with the archive that they were written from."""

import json
import multiprocessing
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader
from torchgeo.datasets.utils import Sample

from geofm.cli import main
from geofm.datamodules import RasterArchiveDataModule, ShardsDataModule
from geofm.datasets import RasterArchive, Seeded
from geofm.datasets.shards import Contents, ShardError, Shards, pack, unpack, write_shards
from tests.datasets.archive.tables import sample_table

pytest.importorskip('litdata', reason="needs the extra 'geofm[shards]'")

SPLIT = {'by': 'place', 'val': 0.2, 'test': 0.0}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of small scenes, and shards of its windows written by the command."""
    folder = tmp_path_factory.mktemp('shards')
    sample_table(folder / 'scenes', size=120, dates=2).write(folder / 'table.parquet')
    command = ['shard', str(folder / 'table.parquet'), str(folder / 'out'), '--window_size', '64']
    command += [
        '--sensor_keys',
        's1',
        's2',
        'dem',
        '--split_by.by',
        'place',
        '--split_by.val',
        '0.2',
    ]
    main([*command, '--split_by.test', '0', '--shard_mib', '1'])
    return folder


def plain(folder: Path, split: Any = 'train') -> RasterArchive:
    file = folder / 'table.parquet'
    return RasterArchive(file, ['s1', 's2', 'dem'], split=split, split_by=SPLIT, window_size=64)


def check_same(one: Sample, other: Sample) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        # Compare bits, not numbers: NaN equals NaN, and -0.0 differs from 0.0.
        ours, theirs = (v.contiguous().reshape(-1).view(torch.uint8) for v in (value, other[key]))
        assert torch.equal(ours, theirs), key


def test_samples_are_those_of_the_files_bit_for_bit(folder: Path) -> None:
    for split in ('train', 'val'):
        archive, shards = plain(folder, split), Shards(str(folder / 'out' / split))
        assert len(shards) == len(archive)
        assert shards.bands == archive.bands
        for i in range(len(archive)):
            check_same(shards[i], archive[i])
    assert shards.files_of(3) == [Path(p) for p in archive.files_of(3)]
    assert len(list((folder / 'out' / 'train').glob('*.bin'))) > 3
    with pytest.raises(IndexError, match='out of range'):
        shards[len(shards)]


def test_the_epoch_of_shards_is_that_of_the_files(folder: Path) -> None:
    seed_everything(0, verbose=False)
    sensors = ['s1', 's2', 'dem']
    files = RasterArchiveDataModule(
        str(folder / 'table.parquet'), sensors, split=SPLIT, window_size=64, batch_size=8
    )
    shards = ShardsDataModule(str(folder / 'out'), sensors, batch_size=8, num_workers=1)
    loaders = []
    for data in (files, shards):
        data.setup('fit')
        loaders.append(data.train_dataloader())
    pairs = zip(*loaders, strict=True)
    for ours, theirs in pairs:
        check_same(ours, theirs)
    assert torch.equal(files.mean, shards.mean)
    assert shards.files({'index': torch.tensor([1])}) == files.files({'index': torch.tensor([1])})


class Ranges(SimpleHTTPRequestHandler):
    """Server of the files of a folder and their ranges that counts the requests."""

    requests: ClassVar[list[str]] = []
    #: Requests are answered when so many of them wait.
    together = threading.Barrier(1)

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.together.wait(60)
        content = Path(self.translate_path(self.path)).read_bytes()
        size = len(content)
        if asked := self.headers.get('Range'):
            first, last = (int(v) for v in asked.removeprefix('bytes=').split('-'))
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {first}-{last}/{size}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.send_header('Last-Modified', 'Mon, 01 Jan 2024 00:00:00 GMT')
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@pytest.mark.usefixtures('forkserver')
def test_one_request_per_sample_of_a_server(folder: Path) -> None:
    pytest.importorskip('obstore', reason="needs the extra 'geofm[shards]'")
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Ranges, directory=str(folder / 'out')))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {'client_options': {'allow_http': True}}
    local = Shards(str(folder / 'out' / 'train'))
    url = f'http://127.0.0.1:{server.server_port}'
    shards = Shards(f'{url}/train', options)
    Ranges.requests.clear()
    for i in range(len(local)):
        check_same(shards[i], local[i])
    # One request per sample, and requests for the index and the offsets of each shard.
    files = len(list((folder / 'out' / 'train').glob('*.bin')))
    assert len(Ranges.requests) == len(local) + files + 1
    sensors = ['s1', 's2', 'dem']
    data = ShardsDataModule(url, sensors, batch_size=8, num_workers=1, storage_options=options)
    data.setup('validate')
    loader, expected = data.val_dataloader(), Shards(str(folder / 'out' / 'val'))
    assert isinstance(loader, DataLoader)
    check_same(next(iter(loader)), data.collate_fn([expected[i] for i in range(8)]))
    # The server answers no request of a batch before it has received all of them.
    Ranges.together = threading.Barrier(4)
    Ranges.requests.clear()
    order = [5, 1, 6, 2]
    batch = next(iter(DataLoader(Seeded(shards), 4, sampler=order, collate_fn=list)))
    Ranges.together = threading.Barrier(1)
    assert len(Ranges.requests) == 4
    for sample, i in zip(batch, order, strict=True):
        check_same(sample, local[i])
    forked = multiprocessing.get_context('fork').Pool(1)
    with forked, pytest.raises(ShardError, match='by forkserver or spawn'):
        forked.apply(shards.__getitem__, (0,))
    server.shutdown()


def test_litdata_reads_the_shards(folder: Path) -> None:
    from litdata.streaming import StreamingDataset
    from litdata.streaming.serializers import BytesSerializer

    root = str(folder / 'out' / 'train')
    theirs, ours = StreamingDataset(root, serializers={'pickle': BytesSerializer()}), Shards(root)
    assert len(theirs) == len(ours)
    for i in (0, 7, len(ours) - 1):
        check_same({**unpack(bytes(theirs[i])), 'index': torch.tensor(i)}, ours[i])


def test_values_are_stored_in_the_smallest_exact_type() -> None:
    contents = Contents(('VV', 'B02', 'dem.elevation'), ('s1', 's2', 'dem'))
    image = torch.zeros(3, 2, 2)
    image[0] = torch.tensor([[-1.5, float('nan')], [float('inf'), -0.0]])
    image[1], image[2] = 65_535, -430
    sample: Sample = {'image': image, 'valid': torch.ones(2, 2, dtype=torch.bool)}
    content = pack(sample, contents)
    length = int.from_bytes(content[:8], 'little')
    stored = {k: v['dtype'] for k, v in json.loads(content[8 : 8 + length]).items() if '.' in k}
    assert stored == {'image.s1': 'F32', 'image.s2': 'U16', 'image.dem': 'I16'}
    check_same(unpack(content), sample)
    for value in (-0.0, 0.5, 70_000.0, -40_000.0):
        image[1] = value
        check_same(unpack(pack(sample, contents)), sample)


def test_samples_that_cannot_be_read_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    table = sample_table(tmp_path / 'scenes', size=60, dates=1)
    archive = RasterArchive(table, ['s2'], ['B02'])
    broken = Path(archive.files_of(2)[0])
    broken.write_bytes(b'no raster')
    errors = write_shards(archive, tmp_path / 'out')
    assert len(errors) == 1
    assert str(broken) in errors[0]
    shards = Shards(str(tmp_path / 'out'))
    assert len(shards) == len(archive) - 1
    assert torch.equal(shards[2]['image'], archive[3]['image'])


def test_invalid_shards_are_errors(folder: Path, tmp_path: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    with pytest.raises(ShardError, match='no shards'):
        Shards(str(tmp_path))

    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / 'run').touch, ()

    writer = BinaryWriter(str(tmp_path / 'evil'), chunk_size=1)
    writer[0] = Evil()
    writer.done()
    writer.merge()
    with pytest.raises(ShardError, match='not written by `geofm shard`'):
        Shards(str(tmp_path / 'evil'))
    assert not (tmp_path / 'run').exists()
    outside = tmp_path / 'outside'
    shutil.copytree(folder / 'out' / 'train', outside)
    index = json.loads((outside / 'index.json').read_text())
    index['chunks'][0]['filename'] = '../chunk.bin'
    (outside / 'index.json').write_text(json.dumps(index))
    with pytest.raises(ShardError, match='not in the folder'):
        Shards(str(outside))
    with pytest.raises(ShardError, match='set sensors'):
        ShardsDataModule(str(folder / 'out'), ['s2']).setup('fit')
    assert len(pickle.dumps(Shards(str(folder / 'out' / 'train')))) < 2000
