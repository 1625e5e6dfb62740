"""SEN12MS-CR: pairs of Sentinel-1 and clear or cloudy Sentinel-2 patches of one date."""

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
from geofm.datasets.splitting import Split
from geofm.sen12ms import TIME_STEP, Roi, sen12mscr_split_of
from geofm.sensors import BANDS

#: Clear or cloudy Sentinel-2 images, or both as separate pairs.
Sky = Literal['clear', 'cloudy', 'both']


class SEN12MSCR(SEN12MSCRTS):
    """SEN12MS-CR: co-registered Sentinel-1, clear and cloudy Sentinel-2, one date each.

    `SEN12MS-CR <https://patricktum.github.io/cloud_removal/sen12mscr/>`__ has 122,218 patch
    triplets of 169 regions of interest (ROIs) around the world, in four seasons: Sentinel-1 GRD
    (VV, VH, dB, float32), and a clear and a cloudy Sentinel-2 Level-1C image (13 bands, DN =
    reflectance x 10,000, uint16), 256 x 256 pixels of 10 m in the UTM zone of the place. Patches
    are 128 pixels apart, so that neighbours overlap by half. Data must therefore be split by ROI.

    The files are ``ROIs1868_summer_s1/s1_19/ROIs1868_summer_s1_19_p30.tif``,
    ``ROIs1868_summer_s2/s2_19/ROIs1868_summer_s2_19_p30.tif`` and
    ``ROIs1868_summer_s2_cloudy/s2_cloudy_19/ROIs1868_summer_s2_cloudy_19_p30.tif``. Folders are
    ignored. The names have no dates, so that 'dates' of a sample are missing, and the interval in
    the index is the period of all images. An S1 and an S2 file are a pair if season, ROI and patch
    in their names are equal. The cloudy image makes another pair with the same S1 file.

    Splits are by ROI, from the lists of the authors (github.com/PatrickTUM/SEN12MS-CR-TS), see
    :func:`geofm.sen12ms.sen12mscr_split_of`. Otherwise it is like
    :class:`geofm.datasets.SEN12MSCRTS`.

    If you use this dataset in your research, please cite the following paper:

    * https://doi.org/10.1109/TGRS.2020.3024744

    In the index, ``season`` is e.g. ``'ROIs1868_summer'``, and ``time_step`` is 0 for a clear S2
    image and 1 for a cloudy one.

    Attributes:
        sky: Which S2 images are used: 'clear', 'cloudy' or 'both'.
    """

    # The names have the season but not the year, so use the time from the launch of Sentinel-2A to
    # the publication of the data set.
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
                ``.parquet``, see :class:`~geofm.datasets.SEN12MSCRTS`.
            split: One of 'train', 'val', 'test' or 'all'.
            sky: Use the 'clear' or the 'cloudy' S2 images, or 'both' as separate pairs.
            bands: Names of the bands to return, in this order.
            transforms: Applied to each sample after everything else.
            on_error: See :class:`~geofm.datasets.SEN12MSCRTS`.
            catalogue: See :class:`~geofm.datasets.SEN12MSCRTS`.
            min_overlap: See :class:`~geofm.datasets.SEN12MSCRTS`.

        Raises:
            BandError: If a band is unknown or given twice.
            DatasetNotFoundError: If no S1 or S2 file is found.
            EmptySplitError: If there are files, but no pair for *split*. It is a ValueError.
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
