import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from geofm.atomic import atomic_file, atomic_folder, part_of, remove_leftovers
from geofm.locking import LockedError, locked_folder, locked_name
from geofm.models.checkpoints.files import write_weights
from tests.killing import killed_before_rename, leftovers


def write(path: Path, text: str) -> None:
    with atomic_file(path) as part:
        part.write_text(text)


def fill(path: Path, text: str, replace: bool = False) -> None:
    with atomic_folder(path, replace) as part:
        (part / 'a').mkdir()
        (part / 'a' / 'b.txt').write_text(text)


def test_a_file_is_complete_or_unchanged(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'a.txt'
    with atomic_file(path) as part:
        part.write_text('first')
        assert not path.exists()
        assert (part.parent, part.suffix) == (path.parent, '.txt')

    def fail() -> None:
        with atomic_file(path) as part:
            part.write_text('half of the sec')
            part.with_name(part.name + '.ovr.tmp').write_text("GDAL's")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == 'first'
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_not_overwritten_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r'give the name of a file'):
        write(tmp_path, 'text')


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'out'

    def fail() -> None:
        with atomic_folder(path, replace=True) as part:
            (part / 'half').touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not any(path.parent.iterdir())
    fill(path, 'first')
    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(FileExistsError, match='exists already'):
        fill(path, 'second')
    assert (path / 'a' / 'b.txt').read_text() == 'first'
    fill(path, 'second', replace=True)
    assert (path / 'a' / 'b.txt').read_text() == 'second'
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('writer', [write, fill])
def test_the_next_run_removes_leftovers_of_a_killed_run(
    tmp_path: Path, writer: Callable[[Path, str], None]
) -> None:
    path = tmp_path / 'out.d'
    killed_before_rename(lambda: writer(path, 'first'))
    assert not path.exists()
    (half,) = (entry for entry in tmp_path.iterdir() if '.part' in entry.name)
    half.with_name(half.name + '.ovr.tmp').write_text("GDAL's")
    other = tmp_path / '.other.txt.host.1.part.txt'
    other.touch()
    writer(path, 'second')
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_temporary_files_of_a_running_process_are_kept(tmp_path: Path) -> None:
    part = part_of(tmp_path / 'a')
    parent = part.with_name(part.name.replace(str(os.getpid()), str(os.getppid())))
    far = part.with_name('.a.elsewhere.1.part')
    for path in (part, parent, far):
        path.touch()
    remove_leftovers(tmp_path / 'a')
    assert sorted(tmp_path.iterdir()) == sorted([part, parent, far])


def test_a_folder_is_restored_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    path = tmp_path / 'page'
    fill(path, 'first')
    process = os.fork()
    if not process:
        names: list[Path] = []
        rename = Path.rename

        def second_dies(self: Path, target: Path) -> Path:
            names.append(self)
            return rename(self, target) if len(names) == 1 else os._exit(9)

        Path.rename = second_dies  # type: ignore[method-assign,assignment]
        fill(path, 'second', replace=True)
    os.waitpid(process, 0)
    assert not path.exists()
    remove_leftovers(path)
    assert (path / 'a' / 'b.txt').read_text() == 'first'
    fill(path, 'second', replace=True)
    assert (path / 'a' / 'b.txt').read_text() == 'second'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('umask', [0o022, 0o002, 0o077])
def test_files_get_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = write_weights({'a': torch.zeros(3)}, tmp_path / 'a.safetensors')
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def limited(function: Callable[[], object], size: int) -> str:
    """Call a function with a limit on the size of files, and return what it raises."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match='too large') as caught:
            function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    return str(caught.value)


@pytest.mark.parametrize('suffix', ['.pth', '.txt', '.tif'])
def test_a_full_disk_is_reported_whatever_the_writer_raises(tmp_path: Path, suffix: str) -> None:
    """PyTorch raises RuntimeError, and GDAL ignores errors on closing."""
    path = tmp_path / f'a{suffix}'
    tensor = torch.randn(1_000_000)

    def save() -> None:
        with atomic_file(path) as part:
            if suffix == '.pth':
                torch.save(tensor, part)
            elif suffix == '.txt':
                part.write_text('a' * 4_000_000)
            else:
                profile = {'driver': 'GTiff', 'count': 1, 'width': 500, 'height': 500}
                tiles = {'tiled': True, 'blockxsize': 256, 'blockysize': 256}
                with rasterio.open(part, 'w', **profile, **tiles, dtype='float32') as dst:
                    dst.write(np.ones((1, 500, 500), np.float32))

    message = limited(save, 2**20)
    assert message.endswith(f"'{path}'")
    assert not any(tmp_path.iterdir())


def test_safetensors_on_a_full_disk_raises_oserror(tmp_path: Path) -> None:
    path = tmp_path / 'a.safetensors'
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match='too large'):
            write_weights({'a': torch.randn(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


HOLD = """
import sys, time
from geofm.locking import locked_folder, locked_name
with {lock}({path!r}):
    print('held', flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize('lock', [locked_folder, locked_name])
def test_a_lock_names_its_holder_and_is_released_with_it(
    tmp_path: Path, lock: Callable[..., object]
) -> None:
    path = tmp_path / 'out'
    code = HOLD.format(lock=lock.__name__, path=str(path))
    holder = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == 'held\n'
    message = rf'out: process {holder.pid} on .* another output'
    for _ in range(2):
        with pytest.raises(LockedError, match=message), lock(path):  # type: ignore[attr-defined]
            pass
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with lock(path), lock(path):  # type: ignore[attr-defined]
        # A forked process does not hold the lock.
        child = os.fork()
        if not child:
            time.sleep(5)
            os._exit(0)
    with lock(path):  # type: ignore[attr-defined]
        assert time.monotonic() - start < 2
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert leftovers(tmp_path) == []
