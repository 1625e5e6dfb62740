"""What the names of SEN12MS-CR-TS say, and why files are left out."""

import os
import re
import warnings
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from pathlib import PurePath
from typing import NamedTuple, Self

#: Numbers in names that are larger than that are none of a data set.
MOST = 2**31 - 1

_SCENE_NAME = re.compile(
    r'(?P<sensor>s1|s2)_(?P<season>ROIs\d{4})_(?P<roi>\d+)_ImgNo_(?P<time_step>\d+)'
    r'_(?P<date>\d{4}-\d{2}-\d{2})_patch_(?P<patch>\d+)\.tif',
    re.ASCII,
)


class PairKey(NamedTuple):
    """What the S1 and the S2 file of a pair have in common; keys sort as the pairs do.

    Attributes:
        season: Season folder, e.g. ``'ROIs2017'``.
        roi: Number of the ROI.
        patch: Number of the patch in the ROI.
        time_step: Number of the time step, 0 to 29 in the real data set.
    """

    season: str
    roi: int
    patch: int
    time_step: int


@dataclass(frozen=True, slots=True)
class SceneName:
    """What the name of a file says.

    Attributes:
        sensor: ``'s1'`` or ``'s2'``.
        key: Place and time step.
        date: Day of acquisition.
    """

    sensor: str
    key: PairKey
    date: date

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> Self | None:
        """Read a file's name; its folders say nothing that the name does not.

        Args:
            path: Path of the file.

        Returns:
            What the name says, or None if it is not the name of an S1 or S2 patch.
        """
        match = _SCENE_NAME.fullmatch(PurePath(path).name)
        if match is None:
            return None
        try:
            day = date.fromisoformat(match['date'])
        except ValueError:
            return None
        numbers = [int(match[name]) for name in ('roi', 'patch', 'time_step')]
        if max(numbers) > MOST:
            return None
        return cls(match['sensor'], PairKey(match['season'], *numbers), day)

    @property
    def filename(self) -> str:
        """The name itself, e.g. ``s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif``."""
        season, roi, patch, time_step = self.key
        return f'{self.sensor}_{season}_{roi}_ImgNo_{time_step}_{self.date}_patch_{patch}.tif'

    @property
    def folder(self) -> str:
        """Folder of the file below the root of the tree, e.g. ``ROIs2017/32/S1/4``."""
        season, roi, _, time_step = self.key
        return f'{season}/{roi}/{self.sensor.upper()}/{time_step}'


class Reason(StrEnum):
    """Why files are left out of the pairs."""

    NAME = 'not named like a scene of SEN12MS-CR-TS'
    ONLY_S1 = 'S1 without S2'
    ONLY_S2 = 'S2 without S1'
    AMBIGUOUS = 'another file has the same sensor, ROI, patch and time step'
    UNREADABLE = 'not readable as a raster'
    BAND_COUNT = 'wrong number of bands'
    NO_EPSG = 'no CRS with an EPSG code'
    DTYPE = 'wrong type of pixels'
    APART = 'S1 and S2 overlap too little on the ground'
    BAD = 'marked as bad in the catalogue'
    BANDS = 'without some of the bands that are asked for'


@dataclass
class Skipped:
    """Files that were left out, by reason.

    Attributes:
        files: Paths for each reason that occurred. One file stands for a pair that is left out
            because of that file.
    """

    files: dict[Reason, list[str]] = field(default_factory=dict)

    def add(self, reason: Reason, *paths: str) -> None:
        """Note files that are left out.

        Args:
            reason: Why.
            *paths: The files.
        """
        self.files.setdefault(reason, []).extend(paths)

    def __len__(self) -> int:
        """Number of files noted."""
        return sum(len(paths) for paths in self.files.values())

    def count(self, *reasons: Reason) -> int:
        """Number of files left out for any of the reasons.

        Args:
            *reasons: The reasons.

        Returns:
            The number of files.
        """
        return sum(len(self.files.get(reason, ())) for reason in reasons)

    def __str__(self) -> str:
        """Counts and the first example of each reason."""
        return '; '.join(
            f'{len(paths)} {reason} (first: {paths[0]})' for reason, paths in self.files.items()
        )

    def warn(self) -> None:
        """Report what was left out in one warning, if anything was."""
        if self.files:
            warnings.warn(f'files left out: {self}', UserWarning, stacklevel=4)
