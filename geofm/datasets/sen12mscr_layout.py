"""SEN12MS-CR as a layout."""

from geofm.datasets.sen12mscr import sen12mscr_split_of
from geofm.datasets.table.layout import Files, Layout


def _split_of(place: str) -> str:
    """Official split of a place, by its ROI."""
    season, name, roi, _ = place.split('_')
    return sen12mscr_split_of(f'{season}_{name}', int(roi))


#: Files ``ROIs1868_summer_s1_19_p30.tif`` and clear ``ROIs1868_summer_s2_19_p30.tif``; a place is a
#: patch, ``ROIs1868_summer_19_30``. Names have a season but no date. Cloudy files
#: (``s2_cloudy``) are of the same place and no other time that is known, and are left out.
SEN12MSCR_LAYOUT = Layout(
    tuple(
        Files(
            sensor,
            rf'(?P<season>ROIs\d{{4}}_[a-z]+)_{sensor}_(?P<roi>\d+)_p(?P<patch>\d+)\.tif',
            place='{season}_{roi}_{patch}',
        )
        for sensor in ('s1', 's2')
    ),
    split_of=_split_of,
    source='layout sen12mscr',
)
