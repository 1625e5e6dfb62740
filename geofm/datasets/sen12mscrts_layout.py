"""SEN12MS-CR-TS as a layout."""

from geofm.datasets.regions import split_of
from geofm.datasets.table.layout import Files, Layout

_NAME = (
    r'(?P<season>ROIs\d{4})_(?P<roi>\d+)_ImgNo_\d+_(?P<date>\d{4}-\d{2}-\d{2})_patch_(?P<patch>\d+)'
)


def _split_of(place: str) -> str:
    """Official split of a place, by its ROI."""
    season, roi, _ = place.split('_')
    return split_of(season, int(roi))


#: Files ``s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif``; a place is a patch,
#: ``ROIs2017_32_12``. Observations are matched by date: S1 and S2 of a time step differ by days.
SEN12MSCRTS_LAYOUT = Layout(
    tuple(
        Files(
            sensor,
            rf'{sensor}_{_NAME}\.tif',
            date_format='%Y-%m-%d',
            place='{season}_{roi}_{patch}',
        )
        for sensor in ('s1', 's2')
    ),
    split_of=_split_of,
    source='layout sen12mscrts',
)
