"""A stalled worker ends the run with a message that names the file."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample

from geofm.datamodules.stalled import Watched, WatchedLoader


class Files(Dataset[Sample]):
    """Data set with one file per sample."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        with self.files[index].open('rb') as file:
            return {'image': torch.tensor(list(file.read()))}


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs a file that hangs')
def test_a_stalled_file_is_named(tmp_path: Path) -> None:
    """The stalled worker is killed."""
    files = [tmp_path / f'{i}.tif' for i in range(6)]
    for path in files:
        path.write_bytes(b'x')
    files[3].unlink()
    os.mkfifo(files[3])
    loader = WatchedLoader(
        Watched(Files(files), 2), num_workers=2, timeout=1, persistent_workers=True
    )
    start = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r'no batch within 1 s\. Files being read: \S+/3\.tif\. Check'
    ):
        list(loader)
    del loader
    assert time.monotonic() - start < 30


def test_without_workers_nothing_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / '0.tif'
    path.write_bytes(b'x')
    assert len(list(WatchedLoader(Watched(Files([path]), 0)))) == 1
