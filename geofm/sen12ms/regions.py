"""Regions of interest (ROIs), official splits and world regions of the data sets.

The lists are those published with the authors' loader (Ebel et al., "SEN12MS-CR-TS: A Remote
Sensing Data Set for Multi-modal Multi-temporal Cloud Removal", IEEE TGRS 2022,
github.com/PatrickTUM/SEN12MS-CR-TS). Each ROI belongs to one split, so that training and test areas
are disjoint.
"""

#: A ROI: season folder and number, as in ``('ROIs2017', 32)``.
type Roi = tuple[str, int]

#: Numbers of the ROIs of each season.
ROIS: dict[str, tuple[int, ...]] = {
    'ROIs1158': (106,),
    'ROIs1868': (17, 36, 56, 73, 85, 100, 114, 119, 121, 126, 127, 139, 142, 143),
    'ROIs1970': (
        20,
        21,
        35,
        40,
        57,
        65,
        71,
        82,
        83,
        91,
        112,
        116,
        119,
        128,
        132,
        133,
        135,
        139,
        142,
        144,
        149,
    ),
    'ROIs2017': (8, 22, 25, 32, 49, 61, 63, 69, 75, 103, 108, 115, 116, 117, 130, 140, 146),
}

#: ROIs of the official val split of SEN12MS-CR-TS.
VAL_ROIS: frozenset[Roi] = frozenset(
    {('ROIs1868', 17), ('ROIs1868', 127), ('ROIs1970', 65), ('ROIs2017', 22), ('ROIs2017', 117)}
)

#: ROIs of the official test split of SEN12MS-CR-TS.
TEST_ROIS: frozenset[Roi] = frozenset(
    {
        ('ROIs1158', 106),
        ('ROIs1868', 73),
        ('ROIs1868', 100),
        ('ROIs1868', 119),
        ('ROIs1868', 142),
        ('ROIs1970', 20),
        ('ROIs1970', 132),
        ('ROIs1970', 139),
        ('ROIs2017', 32),
        ('ROIs2017', 63),
        ('ROIs2017', 103),
        ('ROIs2017', 108),
        ('ROIs2017', 140),
    }
)

# The published train list of asiaWest names ROIs1970/115 and ROIs1970/130, which do not exist.
# ROIs2017/115 and ROIs2017/130 exist and are used instead.
#: World region of every ROI, with the published spelling.
REGIONS: dict[str, frozenset[Roi]] = {
    'africa': frozenset(
        {
            ('ROIs1970', 21),
            ('ROIs1970', 35),
            ('ROIs1970', 40),
            ('ROIs2017', 8),
            ('ROIs2017', 22),
            ('ROIs2017', 32),
            ('ROIs2017', 61),
            ('ROIs2017', 75),
            ('ROIs2017', 140),
        }
    ),
    'america': frozenset(
        {
            ('ROIs1158', 106),
            ('ROIs1868', 36),
            ('ROIs1868', 85),
            ('ROIs1970', 65),
            ('ROIs1970', 82),
            ('ROIs1970', 132),
            ('ROIs1970', 142),
            ('ROIs2017', 49),
            ('ROIs2017', 116),
        }
    ),
    'asiaEast': frozenset(
        {
            ('ROIs1868', 73),
            ('ROIs1868', 114),
            ('ROIs1868', 119),
            ('ROIs1868', 126),
            ('ROIs1868', 143),
            ('ROIs1970', 116),
            ('ROIs1970', 135),
            ('ROIs1970', 139),
            ('ROIs2017', 25),
            ('ROIs2017', 117),
        }
    ),
    'asiaWest': frozenset(
        {
            ('ROIs1868', 100),
            ('ROIs1868', 127),
            ('ROIs1970', 57),
            ('ROIs1970', 83),
            ('ROIs1970', 112),
            ('ROIs2017', 69),
            ('ROIs2017', 115),
            ('ROIs2017', 130),
        }
    ),
    'europa': frozenset(
        {
            ('ROIs1868', 17),
            ('ROIs1868', 56),
            ('ROIs1868', 121),
            ('ROIs1868', 139),
            ('ROIs1868', 142),
            ('ROIs1970', 20),
            ('ROIs1970', 71),
            ('ROIs1970', 91),
            ('ROIs1970', 119),
            ('ROIs1970', 128),
            ('ROIs1970', 133),
            ('ROIs1970', 144),
            ('ROIs1970', 149),
            ('ROIs2017', 63),
            ('ROIs2017', 103),
            ('ROIs2017', 108),
            ('ROIs2017', 146),
        }
    ),
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
SEN12MSCR_VAL_ROIS: frozenset[Roi] = frozenset(
    {
        ('ROIs1158', 17),
        ('ROIs1868', 17),
        ('ROIs1868', 19),
        ('ROIs1868', 80),
        ('ROIs1868', 127),
        ('ROIs1970', 65),
        ('ROIs2017', 22),
        ('ROIs2017', 84),
        ('ROIs2017', 107),
        ('ROIs2017', 130),
    }
)

#: ROIs of the official test split of SEN12MS-CR.
SEN12MSCR_TEST_ROIS: frozenset[Roi] = frozenset(
    {
        ('ROIs1158', 31),
        ('ROIs1158', 44),
        ('ROIs1158', 106),
        ('ROIs1158', 123),
        ('ROIs1158', 140),
        ('ROIs1868', 73),
        ('ROIs1868', 119),
        ('ROIs1970', 139),
        ('ROIs2017', 63),
        ('ROIs2017', 108),
    }
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
