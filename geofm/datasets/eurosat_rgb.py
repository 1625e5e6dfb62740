"""RGB images of EuroSAT, read from one zip file and split by location."""

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

#: DN per grey level. The images are DN x 255 / 2,750, clipped to 255.
DN_PER_LEVEL = 2750 / 255

#: Fractions of the cells used for validation and test.
_SHARES = {'val': 0.2, 'test': 0.2}

Cell = tuple[int, int]


class EuroSATRGB(NonGeoDataset):
    """EuroSAT's Sentinel-2 patches of ten land-cover classes, as DN of three bands.

    Patches are adjacent on the ground, so a random split would put neighbouring patches into both
    training and test. Here each cell of one degree belongs to one split.

    `EuroSAT <https://github.com/phelber/EuroSAT>`_: Helber et al., 2019. The zip file contains
    Level-1C images named ``<Class>/<Class>_<number>.jpg``, 64 x 64 pixels of 10 m. ``latlon.csv``
    in the same folder has the columns path, label, latitude and longitude (WGS84).
    """

    def __init__(
        self,
        root: str | Path = 'data/eurosat_rgb',
        split: Literal['train', 'val', 'test'] = 'train',
        transforms: Callable[[Sample], Sample] | None = None,
        seed: int = 0,
    ) -> None:
        """Initialize a new EuroSATRGB instance and decode the images into memory.

        Args:
            root: Folder with ``eurosat_rgb.zip`` and ``latlon.csv``.
            split: One of 'train' (60 % of the cells), 'val' (20 %) and 'test' (20 %).
            transforms: Applied to each sample.
            seed: Seed of the random split.

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
        """Return the number of patches."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Return a patch.

        Args:
            index: Index of the patch.

        Returns:
            ``image`` in DN, float32 (3, 64, 64), bands :data:`BANDS`; ``label``, int64 ().
        """
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1).float() * DN_PER_LEVEL
        sample: Sample = {'image': image, 'label': torch.tensor(self.labels[index])}
        return sample if self.transforms is None else self.transforms(sample)


def cells_of_split(cells: set[Cell], split: str, seed: int) -> set[Cell]:
    """Draw the cells of a split at random.

    Args:
        cells: All cells, each the floor of latitude and longitude in degrees.
        split: 'train', 'val' or 'test'.
        seed: Seed of the draw.

    Returns:
        The cells of the split.
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
    """Read path, label and cell of each patch."""
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
            f'{path}: must have the columns path, label, latitude, longitude: {error}'
        ) from error


def _read_images(path: Path, names: list[str], split: str) -> npt.NDArray[np.uint8]:
    """Decode images of a zip file, uint8 (N, H, W, 3)."""
    images = []
    try:
        with zipfile.ZipFile(path) as file:
            for name in track(names, description=f'Decoding {split}', transient=True):
                with Image.open(io.BytesIO(file.read(name))) as image:
                    images.append(np.asarray(image.convert('RGB')))
    except (zipfile.BadZipFile, KeyError, UnidentifiedImageError) as error:
        raise ValueError(f'{path}: cannot be read: {error}') from error
    return np.stack(images)
