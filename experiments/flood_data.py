"""The OMBRIA flood tiles as the table of rasters and the arrays that `experiments/floods.py` needs.

OMBRIA (Drakonakis et al., IEEE JSTARS 2022) has 534 places of 256 x 256 px in a zip file:
`s1/after/NNNN.png` (8-bit backscatter), `s2/after/NNNN.png` (8-bit composite of 3 bands),
`mask/NNNN.png` (0 or 255: flooded), and `s1/before`, `s2/before` of the even numbers. Successive
numbers are often neighbours of one event, so that splits are runs of numbers.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import yaml
from archives import ARCHIVES
from PIL import Image

from geofm.atomic import atomic_file, atomic_folder
from geofm.cli import main as geofm
from geofm.legend import Legend
from geofm.sensors import load_sensors

#: Side of a place, and of the windows of it that a backbone sees, in pixels.
SIDE = 256
WINDOW = 128

#: What is told apart.
LEGEND = Legend.of(
    {'no flood': {'value': 0, 'color': '#d9d4c7'}, 'flood': {'value': 1, 'color': '#2f6fb5'}}
)

Split = Literal['train', 'val', 'test']

#: Runs of places, first and last, by split. Places at the borders of events are in none.
RUNS: dict[Split, tuple[tuple[int, int], ...]] = {
    'train': ((1, 109), (115, 118), (163, 170), (185, 189), (259, 336), (412, 534)),
    'val': ((143, 152), (192, 198), (226, 244)),
    'test': ((121, 135), (155, 159), (173, 182), (201, 215), (339, 409)),
}

#: Channels of a table of both sensors, by sensor.
BANDS = {
    'radar': ('radar.backscatter',),
    'optical': ('optical.first', 'optical.second', 'optical.third'),
}

#: What the table calls combinations of sensors, and their keys.
BOTH = 'S1 + S2'
SENSOR_SETS: dict[str, tuple[str, ...]] = {
    'S1': ('radar',),
    'S2': ('optical',),
    BOTH: ('radar', 'optical'),
}

#: Folders of the zip file by sensor.
_FOLDERS = {'radar': 's1', 'optical': 's2'}

_MASK = """
flood:
  {title: Flooded, quantity: other, unit: class, resampling: nearest, static: true,
   bands: [{name: class, mean: 0, std: 1}]}
"""

_PHOTOMETRY = {
    'gain': [0.8, 1.2],
    'band_gain': [0.9, 1.1],
    'offset': [-8.0, 8.0],
    'blur': [0.1, 0.5],
}

type Pixels = npt.NDArray[np.uint8]


def run_of(number: int) -> tuple[Split, tuple[int, int]] | None:
    """Split and run of a place; None if it is in no split.

    Args:
        number: Number of the place.

    Returns:
        The split, and the first and last number of the run.
    """
    for split, runs in RUNS.items():
        for first, last in runs:
            if first <= number <= last:
                return split, (first, last)
    return None


@dataclass(frozen=True)
class Floods:
    """The places in a work folder.

    Attributes:
        root: The work folder, as :func:`prepare` fills it.
    """

    root: Path

    @property
    def images(self) -> Path:
        """Folder of the images: ``<split>/<sensor>/<place>.png``."""
        return self.root / 'images'

    @property
    def sensors(self) -> Path:
        """Definitions of the sensors."""
        return self.root / 'sensors.yaml'

    @property
    def table(self) -> Path:
        """Table of the labelled places."""
        return self.root / 'floods.parquet'

    @property
    def unlabelled(self) -> Path:
        """Table to pretrain on: training places, after and before the flood."""
        return self.root / 'unlabelled.parquet'

    def places(self, split: Split) -> list[str]:
        """Labelled places of a split, in order."""
        return sorted(path.stem for path in (self.images / split / 'flood').glob('*.png'))

    def image(self, split: Split, place: str, sensors: Sequence[str]) -> Pixels:
        """Bands of some sensors of a place.

        Args:
            split: Its split.
            place: Its name.
            sensors: Keys of the sensors.

        Returns:
            Of shape (C, H, W).
        """
        parts = [_read(self.images / split / sensor / f'{place}.png') for sensor in sensors]
        return np.concatenate([np.atleast_3d(part) for part in parts], axis=2).transpose(2, 0, 1)

    def masks(self, split: Split) -> Pixels:
        """Classes of all places of a split, (N, H, W)."""
        return self._masks[split]

    @cached_property
    def _masks(self) -> dict[Split, Pixels]:
        return {
            split: np.stack(
                [self.image(split, place, ['flood'])[0] for place in self.places(split)]
            )
            for split in get_args(Split)
        }


def prepare(archive: Path, root: Path) -> Floods:
    """Unpack the places of the splits, masks as classes 0 and 1, and index them.

    Args:
        archive: ``ombria.zip``.
        root: Work folder; what is there already is kept.

    Returns:
        The places.
    """
    floods = Floods(root)
    root.mkdir(parents=True, exist_ok=True)
    if not floods.images.exists():
        with atomic_folder(floods.images) as part:
            _unpack(archive, part)
    (ombria,) = (entry for entry in ARCHIVES if entry.folder == 'ombria')
    definitions = yaml.safe_load(ombria.definitions + _MASK)
    # How bright a patch is tells water from land.
    for key in _FOLDERS:
        definitions[key]['photometry'] = _PHOTOMETRY
    with atomic_file(floods.sensors) as part:
        part.write_text(yaml.safe_dump(definitions))
    load_sensors(floods.sensors)
    _index(floods, floods.table, r'\d+', ('radar', 'optical', 'flood'))
    _index(floods, floods.unlabelled, r'\d+(-before)?', ('radar', 'optical'), split='train')
    return floods


def _index(
    floods: Floods, table: Path, place: str, sensors: Sequence[str], split: str = r'\w+'
) -> None:
    """Write a table of the images, unless it is there."""
    if table.exists():
        return
    files = [
        {'sensor': key, 'regex': f'(?P<split>{split})/{key}/(?P<place>{place})\\.png'}
        for key in sensors
    ]
    layout = table.with_suffix('.layout.yaml')
    layout.write_text(yaml.safe_dump({'files': files}))
    options = [f'--layout={layout}', f'--sensors={floods.sensors}', f'--output={table}']
    geofm(['index', str(floods.images), *options])


def _unpack(archive: Path, folder: Path) -> None:
    """Write the images of all splits."""
    with zipfile.ZipFile(archive) as source:
        for name, split, target in _members(source.namelist()):
            pixels = _decode(source.read(name))
            if target.parent.name == 'flood':
                # 255 means "no label" in geofm.
                pixels = (pixels > 0).astype(np.uint8)
            path = folder / split / target
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def _members(names: Sequence[str]) -> Iterator[tuple[str, Split, Path]]:
    """Files of the zip that are needed, their split, and their path in it."""
    known = set(names)
    for stem in sorted(Path(name).stem for name in names if name.startswith('mask/')):
        found = run_of(int(stem))
        if found is None:
            continue
        split = found[0]
        yield f'mask/{stem}.png', split, Path('flood') / f'{stem}.png'
        for sensor, of_zip in _FOLDERS.items():
            yield f'{of_zip}/after/{stem}.png', split, Path(sensor) / f'{stem}.png'
            before = f'{of_zip}/before/{stem}.png'
            if split == 'train' and before in known:
                yield before, split, Path(sensor) / f'{stem}-before.png'


def _read(path: Path) -> Pixels:
    return _decode(path.read_bytes())


def _decode(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)
