"""Layouts of SEN12MS-CR-TS and SEN12MS-CR as they are distributed."""

from geofm.datasets.table.layout import Files, Layout
from geofm.sen12ms import sen12mscr_split_of, split_of


def _sen12mscrts_split(place: str) -> str:
    """Return the official split of a place of SEN12MS-CR-TS, which is that of its ROI."""
    season, roi, _ = place.split('_')
    return split_of(season, int(roi))


def _sen12mscr_split(place: str) -> str:
    """Return the official split of a place of SEN12MS-CR, which is that of its ROI."""
    season, name, roi, _ = place.split('_')
    return sen12mscr_split_of(f'{season}_{name}', int(roi))


#: Files such as ``s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif``. A place is a patch, named
#: ``ROIs2017_32_12``. Observations are matched by date: S1 and S2 of a time step differ by days.
SEN12MSCRTS_LAYOUT = Layout(
    tuple(
        Files(
            sensor,
            rf'{sensor}_(?P<season>ROIs\d{{4}})_(?P<roi>\d+)_ImgNo_\d+'
            r'_(?P<date>\d{4}-\d{2}-\d{2})_patch_(?P<patch>\d+)\.tif',
            date_format='%Y-%m-%d',
            place='{season}_{roi}_{patch}',
        )
        for sensor in ('s1', 's2')
    ),
    split_of=_sen12mscrts_split,
    source='layout sen12mscrts',
)

#: Files such as ``ROIs1868_summer_s1_19_p30.tif`` and, without clouds,
#: ``ROIs1868_summer_s2_19_p30.tif``. A place is a patch, named ``ROIs1868_summer_19_30``. The names
#: give a season but no date, so a cloudy file (``s2_cloudy``) could not be told from the clear one
#: of the same place. Cloudy files are left out.
SEN12MSCR_LAYOUT = Layout(
    tuple(
        Files(
            sensor,
            rf'(?P<season>ROIs\d{{4}}_[a-z]+)_{sensor}_(?P<roi>\d+)_p(?P<patch>\d+)\.tif',
            place='{season}_{roi}_{patch}',
        )
        for sensor in ('s1', 's2')
    ),
    split_of=_sen12mscr_split,
    source='layout sen12mscr',
)
