"""Feed mutated GeoTIFFs to all readers: the scan, the data set of pairs, and maps.

Good files of many kinds (plain, tiled and compressed, with masks, names, scales, nodata values) are
truncated, spliced and changed byte by byte and tag by tag, from a seed. The script checks
that only clear errors are raised, that reading stays below a time limit, and that no pixel
counts as valid if its sensor cannot have measured its values. Files are read in separate
processes, so that crashes are counted and the memory of reading is measured without that of the
imports.

    python experiments/fuzz_rasters.py
"""

import argparse
import json
import multiprocessing
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from geofm.datasets import SEN12MSCRTS
from geofm.datasets.catalogue.inspection import inspect
from geofm.maps.scene import Scene
from geofm.sensors import SENSORS

SIZE = 64
NAMES = {
    's1': 's1_ROIs2017_900_ImgNo_0_2018-03-01_patch_0.tif',
    's2': 's2_ROIs2017_900_ImgNo_0_2018-03-02_patch_0.tif',
}

type Generator = np.random.Generator

#: Kinds of files, as GDAL creation options.
PROFILES: tuple[dict[str, Any], ...] = (
    {'interleave': 'pixel'},
    {'interleave': 'pixel', 'ENDIANNESS': 'BIG'},
    {'interleave': 'band'},
    {'interleave': 'pixel', 'nodata': -9999},
    {'tiled': True, 'blockxsize': 32, 'blockysize': 32, 'compress': 'deflate', 'predictor': 2},
    {'compress': 'lzw'},
    {'compress': 'zstd', 'interleave': 'pixel'},
    {'BIGTIFF': 'YES', 'interleave': 'pixel'},
    {'interleave': 'pixel', 'blockysize': 1},
)


def good_file(path: Path, sensor: str, rng: Generator) -> None:
    """Write a good file of a random kind."""
    bands = SENSORS[sensor].band_names
    shape = (len(bands), SIZE, SIZE)
    if sensor == 's1':
        pixels: npt.NDArray[Any] = rng.normal(-14, 5, shape).astype('float32')
    else:
        pixels = rng.integers(1, 9000, shape).astype(rng.choice(['uint16', 'int16']))
    profile = dict(PROFILES[int(rng.integers(len(PROFILES)))])
    if profile.get('nodata') is not None and pixels.dtype == np.uint16:
        profile['nodata'] = 0
    alpha = rng.random() < 0.1
    if alpha:
        pixels = np.concatenate([pixels, np.full((1, SIZE, SIZE), 255, pixels.dtype)])
    if pixels.dtype.kind == 'f':
        profile.pop('predictor', None)
    place = Affine(10, 0, 500_000, 0, -10, 5_300_000)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, 'w', driver='GTiff', count=len(pixels), height=SIZE, width=SIZE,
            dtype=pixels.dtype, crs='EPSG:32632', transform=place, **profile,
        ) as dst,
    ):  # fmt: skip
        dst.write(pixels)
        if alpha:
            dst.colorinterp = [*dst.colorinterp[:-1], ColorInterp.alpha]
        elif rng.random() < 0.2:
            dst.descriptions = list(rng.permutation(bands))
        if rng.random() < 0.1:
            dst.scales = [1e-4 if sensor == 's2' else 0.5] * len(pixels)
        if rng.random() < 0.1:
            dst.write_mask((rng.random((SIZE, SIZE)) < 0.9).astype('uint8') * 255)


def flip(content: bytearray, rng: Generator) -> bytearray:
    """Change some bytes of the header."""
    for _ in range(int(rng.integers(1, 6))):
        content[int(rng.integers(min(len(content), 1500)))] = int(rng.integers(256))
    return content


def tag(content: bytearray, rng: Generator) -> bytearray:
    """Change a field of a directory entry: its tag, type, count or value."""
    order = 'little' if content[:1] == b'I' else 'big'
    start = int.from_bytes(content[4:8], order)  # type: ignore[arg-type]
    for _ in range(int(rng.integers(1, 3))):
        at = start + 2 + 12 * int(rng.integers(18)) + int(rng.choice([0, 2, 4, 8]))
        numbers = [
            0,
            1,
            2,
            13,
            255,
            256,
            1000,
            65535,
            1 << 16,
            1 << 24,
            (1 << 31) - 1,
            (1 << 32) - 1,
        ]
        value = int(rng.choice(numbers)).to_bytes(4, order)  # type: ignore[arg-type]
        if at + 4 <= len(content):
            content[at : at + 4] = value
    return content


def cut(content: bytearray, rng: Generator) -> bytearray:
    """Truncate the file."""
    return content[: int(rng.integers(len(content)))]


def splice(content: bytearray, rng: Generator) -> bytearray:
    """Replace bytes by random ones."""
    start = int(rng.integers(len(content)))
    length = int(rng.integers(1, len(content)))
    junk = rng.bytes(min(length, len(content) - start))
    content[start : start + len(junk)] = junk
    return content


def insert(content: bytearray, rng: Generator) -> bytearray:
    """Insert random bytes."""
    at = int(rng.integers(len(content)))
    return content[:at] + rng.bytes(int(rng.integers(1, 4000))) + content[at:]


def remove(content: bytearray, rng: Generator) -> bytearray:
    """Remove bytes from the middle."""
    at = int(rng.integers(len(content)))
    return content[:at] + content[at + int(rng.integers(1, 4000)) :]


def fill(content: bytearray, rng: Generator) -> bytearray:
    """Write floats that no sensor can measure at some places."""
    value = np.array([rng.choice([3e38, -9999, np.nan, np.inf, 1e10, -200])], '<f4').tobytes()
    for _ in range(int(rng.integers(1, 200))):
        at = int(rng.integers(max(1, len(content) - 4)))
        content[at : at + 4] = value
    return content


MUTATIONS: tuple[Callable[[bytearray, Generator], bytearray], ...] = (
    flip, tag, cut, splice, insert, remove, fill,
)  # fmt: skip


class TooSlowError(BaseException):
    """Reading a file took longer than the limit; not an Exception, which might be handled."""


def good_pair(folder: Path) -> SEN12MSCRTS:
    """Write a good pair.

    Args:
        folder: An empty folder.

    Returns:
        The data set of the pair, which :func:`check` reads again after it has changed a file.
    """
    for sensor, name in NAMES.items():
        good_file(folder / name, sensor, np.random.default_rng(0))
    return SEN12MSCRTS([folder / name for name in NAMES.values()], 'all')


def check(
    indexed: SEN12MSCRTS, folder: Path, number: int, seed: int, limit: float
) -> tuple[str, str, list[str]]:
    """Create a file and read it in all ways.

    Args:
        indexed: Data set of the pair that lay in the folder first.
        folder: Its folder.
        number: Number of the file.
        seed: Seed of all files.
        limit: Seconds that all ways together may take.

    Returns:
        How the file was changed, what the scan said of it, and what is wrong with how it was read.
    """
    rng = np.random.default_rng([seed, number])
    for sensor, name in NAMES.items():
        good_file(folder / name, sensor, rng)
    sensor = 's1' if rng.random() < 0.5 else 's2'
    path = folder / NAMES[sensor]
    mutate = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
    path.write_bytes(mutate(bytearray(path.read_bytes()), rng))
    faults: list[str] = []

    def too_slow(signal_number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, limit)
    problem = 'not told'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            problem = inspect(path, sensor).problem or 'sound'
            ways = {
                'pair, changed since the scan': lambda: _read(indexed),
                'scene': lambda: _read_scene(folder, sensor),
            }
            if problem == 'sound':
                paths = [folder / name for name in NAMES.values()]
                ways['pair'] = lambda: _read(SEN12MSCRTS(paths, 'all'))
                ways['sensor'] = lambda: _read(SEN12MSCRTS(path, 'all', sensors=[sensor]))
            for name, way in ways.items():
                try:
                    faults += [f'{name}: {fault}' for fault in way()]
                except (ValueError, RasterioError):
                    # Messages about a bad file.
                    pass
                except Exception as error:
                    faults.append(f'{name}: {type(error).__name__}: {error}')
    except TooSlowError:
        faults.append('too slow')
    except Exception as error:
        faults.append(f'inspect: {type(error).__name__}: {error}')
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return mutate.__name__, str(problem), faults


def _read(data: SEN12MSCRTS) -> list[str]:
    """Read a data set."""
    faults = []
    for i in range(len(data)):
        sample = data[i]
        faults += _beyond(sample['image'].numpy(), sample['valid'].numpy(), data.bands)
    return faults


def _read_scene(folder: Path, sensor: str) -> list[str]:
    """Read the file as a scene of a map, alone and with the other sensor."""
    faults = []
    for sensors in (('s1', 's2'), (sensor,)):
        paths = {key: folder / NAMES[key] for key in sensors}
        bands = [band for key in sensors for band in SENSORS[key].band_names]
        with (
            suppress(ValueError, RasterioError, FileNotFoundError),
            Scene(bands, files=paths) as scene,
        ):
            sample = scene.read(0, 0, min(SIZE, scene.grid.height), min(SIZE, scene.grid.width))
            faults += _beyond(sample['image'].numpy(), sample['valid'].numpy(), tuple(bands))
    return faults


def _beyond(
    image: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], bands: tuple[str, ...]
) -> list[str]:
    """Return the bands with valid values that their sensor cannot have measured."""
    faults = []
    for sensor in SENSORS.values():
        low, high = sensor.limits
        values = image[[band in sensor.band_names for band in bands]][:, valid]
        if not ((values >= low) & (values <= high)).all():
            faults.append(f'values of {sensor.title} beyond {low:g} to {high:g} are valid')
    return faults


def _work(numbers: list[int], seed: int, limit: float, results: Any) -> None:
    """Read files one after the other and report each."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        indexed = good_pair(Path(folder))
        for number in numbers:
            results.send((number, None, 0))
            found = check(indexed, Path(folder), number, seed, limit)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            results.send((number, found, grown << 10))


def run(
    files: int, seed: int, limit: float, at_once: int = 250
) -> Iterator[tuple[int, tuple[str, str, list[str]], int]]:
    """Read files in processes of their own.

    Args:
        files: Number of files.
        seed: Seed of all files.
        limit: Seconds for a file.
        at_once: Number of files that one process reads, if it lives that long.

    Yields:
        Number of the file, what :func:`check` says of it, and by how many bytes the memory of the
        process has grown at most since its imports.
    """
    context = multiprocessing.get_context('spawn')
    todo = list(range(files))
    while todo:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(todo[:at_once], seed, limit, sender))
        process.start()
        sender.close()
        last = None
        with suppress(EOFError):
            while True:
                # A hang that no signal ends is a crash too.
                if not receiver.poll(60 + 3 * limit):
                    process.kill()
                number, found, grown = receiver.recv()
                last = number
                if found is not None:
                    todo.remove(number)
                    last = None
                    yield number, found, grown
        process.join()
        if last is not None:
            todo.remove(last)
            yield last, ('', '', [f'process ended with exit code {process.exitcode}']), 0


def main() -> None:
    """Read files, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--files', type=int, default=500, help='files of each seed')
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(10)))
    parser.add_argument('--limit', type=float, default=30, help='seconds for a file')
    parser.add_argument('--output', type=Path, default=Path('experiments/results'))
    args = parser.parse_args()
    start = time.monotonic()
    counts: dict[str, Counter[str]] = {key: Counter() for key in ('kinds', 'refused', 'problems')}
    faults: dict[str, list[str]] = {}
    most = 0
    for seed in args.seeds:
        for number, (kind, problem, wrong), grown in run(args.files, seed, args.limit):
            counts['kinds'][kind] += 1
            counts['refused'][kind] += problem != 'sound'
            counts['problems'][problem] += 1
            most = max(most, grown)
            if wrong:
                faults[f'{seed}/{number}'] = wrong
                print(f'seed {seed}, file {number} ({kind}, {problem}): {wrong}', flush=True)
    content = {
        'files': args.files, 'seeds': args.seeds, 'limit_s': args.limit, 'most_bytes': most,
        'seconds': time.monotonic() - start, 'faults': faults, **counts,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'fuzz_rasters.json').write_text(json.dumps(content, indent=1) + '\n')
    (args.output / 'fuzz_rasters.md').write_text(table(content))
    print(table(content))


def table(content: dict[str, Any]) -> str:
    """Return the table of results.

    Args:
        content: What the JSON file holds.

    Returns:
        Markdown.
    """
    seeds, kinds, problems = content['seeds'], content['kinds'], Counter(content['problems'])
    lines = [
        f'# {content["files"] * len(seeds):,} mutated GeoTIFFs',
        '',
        f'Seeds {", ".join(map(str, seeds))}, {content["files"]} files each, '
        f'{content["seconds"] / 60:.0f} minutes. Each file is scanned, read by `SEN12MSCRTS` as if '
        f'it had changed since the scan, read again if the scan finds no problem, and read as a '
        f'scene of a map.',
        '',
        f'- {len(content["faults"])} files with a crash, a hang (over {content["limit_s"]:g} s), '
        f'an unexpected error, or values outside of the range of their sensor counted as valid',
        f'- Peak memory in addition to imports: {content["most_bytes"] / 2**20:.0f} MiB',
        '',
        '| Change | Files | Refused by the scan |',
        '|---|---:|---:|',
        *(f'| {kind} | {kinds[kind]} | {content["refused"][kind]} |' for kind in sorted(kinds)),
        '',
        '| What the scan says | Files |',
        '|---|---:|',
        *(f'| {problem} | {count} |' for problem, count in problems.most_common()),
    ]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
