"""EuroSAT's RGB images out of one zip, split by place."""

import csv
import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torchgeo.datasets import NonGeoDataset
from torchgeo.datasets.errors import DatasetNotFoundError
from torchgeo.datasets.utils import Sample

#: Bands of the images, in the order of their channels.
BANDS = ('B04', 'B03', 'B02')

#: DN of a grey level: the images are DN x 255 / 2,750, clipped.
DN_PER_LEVEL = 2750 / 255

#: Fractions of the cells that validate and test.
_SHARES = {'val': 0.2, 'test': 0.2}

Cell = tuple[int, int]


class EuroSATRGB(NonGeoDataset):
    """Real Sentinel-2 patches of ten classes of land cover, as DN of three bands.

    Patches lie side by side, so a random split puts neighbours into training and test. Here whole
    cells of one degree go to one split.

    `EuroSAT <https://github.com/phelber/EuroSAT>`_: Helber et al., 2019. The zip holds
    ``<Class>/<Class>_<number>.jpg``, 64 x 64 px of 10 m, Level-1C; ``latlon.csv`` beside it the
    columns path, label, latitude and longitude (WGS84).
    """

    def __init__(
        self,
        root: str | Path = 'data/eurosat_rgb',
        split: Literal['train', 'val', 'test'] = 'train',
        transforms: Callable[[Sample], Sample] | None = None,
        seed: int = 0,
    ) -> None:
        """Initialize a new EuroSATRGB instance: the images are decoded once, into memory.

        Args:
            root: Folder with ``eurosat_rgb.zip`` and ``latlon.csv``.
            split: Which cells: three fifths are for training.
            transforms: What to do to each sample.
            seed: Seed of the split.

        Raises:
            DatasetNotFoundError: If a file is missing.
            ValueError: If *split* is unknown, or a file cannot be read.
        """
        self.root = Path(root)
        self.paths = [self.root / name for name in ('eurosat_rgb.zip', 'latlon.csv')]
        if not all(path.is_file() for path in self.paths):
            raise DatasetNotFoundError(self)
        if split not in ('train', *_SHARES):
            raise ValueError(f"split must be 'train', 'val' or 'test', not '{split}'")
        rows = _read_places(self.paths[1])
        self.classes = sorted({label for _, label, _ in rows})
        chosen = cells_of_split({cell for _, _, cell in rows}, split, seed)
        #: Path in the zip, label and cell of each patch.
        self.rows = [row for row in rows if row[2] in chosen]
        self.images = _read_images(self.paths[0], [path for path, _, _ in self.rows], split)
        self.labels = [self.classes.index(label) for _, label, _ in self.rows]
        self.transforms = transforms

    def __len__(self) -> int:
        """Number of patches."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """A patch.

        Args:
            index: Its number.

        Returns:
            ``image`` in DN, float32 (3, 64, 64), bands :data:`BANDS`; ``label``, int64 ().
        """
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1).float() * DN_PER_LEVEL
        sample: Sample = {'image': image, 'label': torch.tensor(self.labels[index])}
        return sample if self.transforms is None else self.transforms(sample)


def cells_of_split(cells: set[Cell], split: str, seed: int) -> set[Cell]:
    """Cells of a split, drawn at random.

    Args:
        cells: All cells: floor of latitude and longitude.
        split: 'train', 'val' or 'test'.
        seed: Seed of the draw.

    Returns:
        Those of the split.
    """
    ordered = sorted(cells)
    order = np.random.default_rng(seed).permutation(len(ordered))
    start = 0
    for name, share in _SHARES.items():
        stop = start + round(share * len(ordered))
        if name == split:
            return {ordered[i] for i in order[start:stop]}
        start = stop
    return {ordered[i] for i in order[start:]}


def _read_places(path: Path) -> list[tuple[str, str, Cell]]:
    try:
        with path.open(newline='') as file:
            return [
                (
                    row['path'],
                    row['label'],
                    (math.floor(float(row['latitude'])), math.floor(float(row['longitude']))),
                )
                for row in csv.DictReader(file)
            ]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f'{path}: needs the columns path, label, latitude, longitude: {error}'
        ) from error


def _read_images(path: Path, names: list[str], split: str) -> npt.NDArray[np.uint8]:
    images = []
    try:
        with zipfile.ZipFile(path) as file:
            for name in track(names, description=f'Decoding {split}', transient=True):
                with Image.open(io.BytesIO(file.read(name))) as image:
                    images.append(np.asarray(image.convert('RGB')))
    except (zipfile.BadZipFile, KeyError, UnidentifiedImageError) as error:
        raise ValueError(f'{path}: cannot be read: {error}') from error
    return np.stack(images)
