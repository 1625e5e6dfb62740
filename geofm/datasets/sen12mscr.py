"""SEN12MS-CR: pairs of Sentinel-1 and clear or cloudy Sentinel-2 patches, one date each."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.catalogue.scenes import SENSOR_NUMBERS, Rows
from geofm.datasets.pairs.dataset import OnError
from geofm.datasets.pairs.inputs import Listing
from geofm.datasets.pairs.pairing import AnyPairing
from geofm.datasets.pairs.table import MIN_OVERLAP
from geofm.datasets.sen12mscrts import SEN12MSCRTS
from geofm.sen12ms import TIME_STEP, Roi, Split, sen12mscr_split_of
from geofm.sensors import BANDS

#: Clear or cloudy Sentinel-2, or each as a pair of its own.
Sky = Literal['clear', 'cloudy', 'both']


class SEN12MSCR(SEN12MSCRTS):
    """SEN12MS-CR: co-registered Sentinel-1, clear and cloudy Sentinel-2, one date each.

    `SEN12MS-CR <https://patricktum.github.io/cloud_removal/sen12mscr/>`__ has 122,218 patch
    triplets of 169 regions of interest (ROIs) around the world, in four seasons: Sentinel-1 GRD
    (VV, VH, dB, float32), and a clear and a cloudy Sentinel-2 Level-1C image (13 bands, DN =
    reflectance x 10,000, uint16), 256 x 256 pixels of 10 m in the UTM zone of the place. Patches
    lie 128 pixels apart, so neighbours overlap by half: whatever is split must be split by ROI.

    Files lie as in ``ROIs1868_summer_s1/s1_19/ROIs1868_summer_s1_19_p30.tif``,
    ``ROIs1868_summer_s2/s2_19/ROIs1868_summer_s2_19_p30.tif`` and
    ``ROIs1868_summer_s2_cloudy/s2_cloudy_19/ROIs1868_summer_s2_cloudy_19_p30.tif``; only the
    names are looked at. They give no dates: 'dates' of a sample are missing, and the interval of
    the index is the period from which all images are. An S1 and an S2 file are a pair if their
    names have season, ROI and patch in common; the cloudy image makes another pair with the
    same S1.

    Splits are by ROI, after the lists of the authors (github.com/PatrickTUM/SEN12MS-CR-TS), see
    :func:`sen12mscr_split_of`. In all else this is :class:`geofm.datasets.SEN12MSCRTS`.

    If you use this dataset in your research, please cite the following paper:

    * https://doi.org/10.1109/TGRS.2020.3024744

    In the index ``season`` is e.g. ``'ROIs1868_summer'``, ``time_step`` 0 for a clear S2 and 1 for
    a cloudy one.

    Attributes:
        sky: Which S2 images are used.
    """

    # The files say the season, but not the year: from the launch of Sentinel-2A to the
    # publication of the set.
    _period = ('2015-06-23', '2020-08-31')

    def __init__(
        self,
        paths: Path | Iterable[Path],
        split: Split = 'train',
        sky: Sky = 'both',
        bands: Sequence[str] = BANDS,
        transforms: Callable[[Sample], Sample] | None = None,
        on_error: OnError = 'raise',
        catalogue: Path | None = None,
        min_overlap: float = MIN_OVERLAP,
    ) -> None:
        """Initialize a new SEN12MSCR instance.

        Args:
            paths: Folders to search, or files; or a list of pairs ``.json`` or a catalogue
                ``.parquet``, as of :class:`~geofm.datasets.SEN12MSCRTS`.
            split: One of 'train', 'val', 'test' or 'all'.
            sky: Which S2 images to use: the 'clear' ones, the 'cloudy' ones, or 'both', each as a
                pair of its own.
            bands: Names of the bands to return, in the order to return them.
            transforms: Applied to each sample, last.
            on_error: As of :class:`~geofm.datasets.SEN12MSCRTS`.
            catalogue: As of :class:`~geofm.datasets.SEN12MSCRTS`.
            min_overlap: As of :class:`~geofm.datasets.SEN12MSCRTS`.

        Raises:
            BandError: If a band is unknown or given twice.
            DatasetNotFoundError: If no S1 or S2 file is found.
            EmptySplitError: If there are files, but no pair for *split*; a ValueError.
            ValueError: If *split* or *sky* is unknown.
        """
        if sky not in get_args(Sky):
            raise ValueError(f"unknown sky '{sky}': choose from {list(get_args(Sky))}")
        self.sky = sky
        super().__init__(
            paths,
            split,
            bands=bands,
            transforms=transforms,
            on_error=on_error,
            catalogue=catalogue,
            min_overlap=min_overlap,
        )

    def _split_of(self, roi: Roi) -> str:
        return sen12mscr_split_of(*roi)

    @property
    def _pairing(self) -> AnyPairing:
        return 'patch'

    def _pair(self, listing: Listing, kept: Rows) -> dict[str, Rows]:
        scenes = listing.scenes
        steps = [TIME_STEP[sky] for sky in TIME_STEP if self.sky in (sky, 'both')]
        wanted = np.isin(scenes.time_step[kept], steps)
        wanted |= scenes.sensor[kept] == SENSOR_NUMBERS['s1']
        return super()._pair(listing, kept[wanted])

    def _filters(self) -> str:
        return f" and sky='{self.sky}'"
