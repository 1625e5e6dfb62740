"""Regions of interest (ROIs), official splits and world regions of the data sets.

The lists are those published with the authors' loader (Ebel et al., "SEN12MS-CR-TS: A Remote
Sensing Data Set for Multi-modal Multi-temporal Cloud Removal", IEEE TGRS 2022,
github.com/PatrickTUM/SEN12MS-CR-TS). Each ROI belongs to one split, so that training and test areas
are disjoint.
"""

from itertools import groupby
from operator import itemgetter

#: A ROI: season folder and number, as in ``('ROIs2017', 32)``.
type Roi = tuple[str, int]


def _rois(**numbers: tuple[int, ...]) -> frozenset[Roi]:
    return frozenset((season, roi) for season, rois in numbers.items() for roi in rois)


#: ROIs of the official val split of SEN12MS-CR-TS.
VAL_ROIS = _rois(
    ROIs1868=(17, 127),
    ROIs1970=(65,),
    ROIs2017=(22, 117),
)

#: ROIs of the official test split of SEN12MS-CR-TS.
TEST_ROIS = _rois(
    ROIs1158=(106,),
    ROIs1868=(73, 100, 119, 142),
    ROIs1970=(20, 132, 139),
    ROIs2017=(32, 63, 103, 108, 140),
)

# The published train list of asiaWest names ROIs1970/115 and ROIs1970/130, which do not exist.
# ROIs2017/115 and ROIs2017/130 exist and are used instead.
#: World region of every ROI, with the published spelling.
REGIONS: dict[str, frozenset[Roi]] = {
    'africa': _rois(
        ROIs1970=(21, 35, 40),
        ROIs2017=(8, 22, 32, 61, 75, 140),
    ),
    'america': _rois(
        ROIs1158=(106,),
        ROIs1868=(36, 85),
        ROIs1970=(65, 82, 132, 142),
        ROIs2017=(49, 116),
    ),
    'asiaEast': _rois(
        ROIs1868=(73, 114, 119, 126, 143),
        ROIs1970=(116, 135, 139),
        ROIs2017=(25, 117),
    ),
    'asiaWest': _rois(
        ROIs1868=(100, 127),
        ROIs1970=(57, 83, 112),
        ROIs2017=(69, 115, 130),
    ),
    'europa': _rois(
        ROIs1868=(17, 56, 121, 139, 142),
        ROIs1970=(20, 71, 91, 119, 128, 133, 144, 149),
        ROIs2017=(63, 103, 108, 146),
    ),
}

#: Numbers of the ROIs of each season.
ROIS: dict[str, tuple[int, ...]] = {
    season: tuple(roi for _, roi in rois)
    for season, rois in groupby(sorted(frozenset().union(*REGIONS.values())), itemgetter(0))
}


def split_of(season: str, roi: int) -> str:
    """Return the split of a ROI of SEN12MS-CR-TS.

    Args:
        season: Season folder, e.g. ``'ROIs2017'``.
        roi: Number of the ROI.

    Returns:
        ``'val'`` or ``'test'`` for the ROIs of the official lists, and ``'train'`` for all other
        ROIs, including those of other data.
    """
    if (season, roi) in VAL_ROIS:
        return 'val'
    return 'test' if (season, roi) in TEST_ROIS else 'train'


def region_of(season: str, roi: int) -> str | None:
    """Return the world region of a ROI.

    Args:
        season: Season folder, e.g. ``'ROIs2017'``.
        roi: Number of the ROI.

    Returns:
        A key of :data:`REGIONS`, or None for a ROI that is not on the official list.
    """
    return next((name for name, rois in REGIONS.items() if (season, roi) in rois), None)


#: ROIs of the official val split of SEN12MS-CR, by season and number.
SEN12MSCR_VAL_ROIS = _rois(
    ROIs1158=(17,),
    ROIs1868=(17, 19, 80, 127),
    ROIs1970=(65,),
    ROIs2017=(22, 84, 107, 130),
)

#: ROIs of the official test split of SEN12MS-CR.
SEN12MSCR_TEST_ROIS = _rois(
    ROIs1158=(31, 44, 106, 123, 140),
    ROIs1868=(73, 119),
    ROIs1970=(139,),
    ROIs2017=(63, 108),
)


def sen12mscr_split_of(season: str, roi: int) -> str:
    """Return the split of a ROI of SEN12MS-CR.

    SEN12MS-CR and SEN12MS-CR-TS share some ROIs. ROIs that SEN12MS-CR-TS holds out and that are on
    no list of SEN12MS-CR (the authors name ROIs1868/100) are held out here too, so that a model
    trained on one data set can be tested on the other.

    Args:
        season: Seed and season, e.g. ``'ROIs1868_summer'``.
        roi: Number of the ROI.

    Returns:
        ``'val'``, ``'test'``, or ``'train'`` for all other ROIs.
    """
    key = (season.split('_')[0], roi)
    if key in SEN12MSCR_VAL_ROIS:
        return 'val'
    return 'test' if key in SEN12MSCR_TEST_ROIS else split_of(*key)
