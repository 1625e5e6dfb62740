"""File names of SEN12MS-CR-TS and SEN12MS-CR."""

import os
import re
from dataclasses import dataclass
from datetime import date
from pathlib import PurePath
from typing import NamedTuple, Self

#: Pixel size of SEN12MS-CR-TS in degrees, along both axes.
PIXEL_SIZE = 8.983152841195215e-05

#: Value of 'time_step' in the index of SEN12MS-CR for clear and cloudy images.
TIME_STEP = {'clear': 0, 'cloudy': 1}

#: Largest number that is accepted in a file name.
LARGEST_NUMBER = 2**31 - 1

_SCENE_NAME = re.compile(
    r'(?P<sensor>s1|s2)_(?P<season>ROIs\d{4})_(?P<roi>\d+)_ImgNo_(?P<time_step>\d+)'
    r'_(?P<date>\d{4}-\d{2}-\d{2})_patch_(?P<patch>\d+)\.tif',
    re.ASCII,
)


class PairKey(NamedTuple):
    """What the S1 and the S2 file of a pair have in common. Keys sort like the pairs.

    Attributes:
        season: Season folder, e.g. ``'ROIs2017'``.
        roi: Number of the ROI.
        patch: Number of the patch in the ROI.
        time_step: Number of the time step, 0 to 29 in the published data set.
    """

    season: str
    roi: int
    patch: int
    time_step: int


@dataclass(frozen=True, slots=True)
class SceneName:
    """Parsed file name of SEN12MS-CR-TS.

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
        """Parse a file name. Folders are ignored.

        Args:
            path: Path of the file.

        Returns:
            Content of the name, or None if it is not the name of an S1 or S2 patch.
        """
        match = _SCENE_NAME.fullmatch(PurePath(path).name)
        if match is None:
            return None
        try:
            day = date.fromisoformat(match['date'])
        except ValueError:
            return None
        numbers = [int(match[name]) for name in ('roi', 'patch', 'time_step')]
        if max(numbers) > LARGEST_NUMBER:
            return None
        return cls(match['sensor'], PairKey(match['season'], *numbers), day)

    @property
    def filename(self) -> str:
        """File name, e.g. ``s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif``."""
        season, roi, patch, time_step = self.key
        return f'{self.sensor}_{season}_{roi}_ImgNo_{time_step}_{self.date}_patch_{patch}.tif'

    @property
    def folder(self) -> str:
        """Folder of the file below the root of the data set, e.g. ``ROIs2017/32/S1/4``."""
        season, roi, _, time_step = self.key
        return f'{season}/{roi}/{self.sensor.upper()}/{time_step}'


_FILE_NAME = re.compile(
    r'(?P<season>ROIs\d{4}_[a-z]+)_(?P<kind>s1|s2|s2_cloudy)_(?P<roi>\d+)_p(?P<patch>\d+)\.tif',
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class PatchName:
    """Content of a file name of SEN12MS-CR.

    Attributes:
        season: Seed and season, e.g. ``'ROIs1868_summer'``.
        kind: ``'s1'``, ``'s2'`` or ``'s2_cloudy'``.
        roi: Number of the ROI ("scene") within the season.
        patch: Number of the patch in the ROI.
    """

    season: str
    kind: str
    roi: int
    patch: int

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> Self | None:
        """Parse a file name. Folders are ignored.

        Args:
            path: Path of the file.

        Returns:
            Content of the name, or None if it is not the name of an S1 or S2 patch.
        """
        match = _FILE_NAME.fullmatch(PurePath(path).name)
        if match is None:
            return None
        roi, patch = int(match['roi']), int(match['patch'])
        if max(roi, patch) > LARGEST_NUMBER:
            return None
        return cls(match['season'], match['kind'], roi, patch)

    @property
    def filename(self) -> str:
        """File name, e.g. ``ROIs1868_summer_s1_19_p30.tif``."""
        return f'{self.season}_{self.kind}_{self.roi}_p{self.patch}.tif'

    @property
    def folder(self) -> str:
        """Folder below the root of the data set, e.g. ``ROIs1868_summer_s1/s1_19``."""
        return f'{self.season}_{self.kind}/{self.kind}_{self.roi}'
