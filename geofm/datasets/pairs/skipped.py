"""Files that are left out of a data set, and the reasons."""

from dataclasses import dataclass, field
from enum import StrEnum

from geofm.printing import warn


class Reason(StrEnum):
    """Reason why files are left out of the pairs."""

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
    BANDS = 'without some of the requested bands'


@dataclass
class Skipped:
    """Files that were left out, by reason.

    Attributes:
        files: Paths for each reason that occurred. For a pair that is left out, only the file that
            causes it is listed.
    """

    files: dict[Reason, list[str]] = field(default_factory=dict)

    def add(self, reason: Reason, *paths: str) -> None:
        """Record files that are left out.

        Args:
            reason: The reason.
            *paths: The files.
        """
        self.files.setdefault(reason, []).extend(paths)

    def __len__(self) -> int:
        """Return the number of files."""
        return sum(len(paths) for paths in self.files.values())

    def count(self, *reasons: Reason) -> int:
        """Return the number of files left out for any of the given reasons.

        Args:
            *reasons: The reasons.

        Returns:
            The number of files.
        """
        return sum(len(self.files.get(reason, ())) for reason in reasons)

    def __str__(self) -> str:
        """Return the count and the first example of each reason."""
        return '; '.join(
            f'{len(paths)} {reason} (first: {paths[0]})' for reason, paths in self.files.items()
        )

    def warn(self) -> None:
        """Warn about the files left out, if there are any."""
        if self.files:
            warn(f'files left out: {self}')
