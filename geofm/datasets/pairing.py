"""Which Sentinel-1 file goes with which Sentinel-2 file."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from geofm.datasets.scan import Reason, Skipped

#: By the time step of the data set, or each S2 with the S1 of the same patch nearest in time.
Pairing = Literal['time_step', 'nearest']

_PLACE = ['season', 'roi', 'patch']
_KEY = [*_PLACE, 'time_step']


def pair_scenes(
    scenes: pd.DataFrame, sensors: Sequence[str], pairing: Pairing, skipped: Skipped
) -> pd.DataFrame:
    """Find the pairs among files.

    Args:
        scenes: One row a file: ``path``, ``sensor``, ``season``, ``roi``, ``patch``,
            ``time_step``, ``date``; numbered from 0.
        sensors: The sensors that a sample needs. With one of them, each of its files is a
            sample of its own.
        pairing: 'time_step', or 'nearest': each S2 with the S1 of the same patch whose day is
            nearest, the earlier of two; an S1 may go with several S2.
        skipped: Takes the files that have no partner, and those that share all of sensor, place
            and time step.

    Returns:
        Columns ``s1`` and ``s2``: rows of *scenes*, -1 for a sensor that is not needed. Sorted by
        season, ROI, patch and time step (of S2, if needed).
    """
    scenes = scenes[scenes['sensor'].isin(list(sensors))]
    keys = scenes.groupby(_KEY, sort=True).ngroup()
    # By time step a key is no good if either sensor has two files, else only the file's own is.
    twice = pd.DataFrame({'sensor': scenes['sensor'], 'key': keys}).duplicated(keep=False)
    if pairing == 'time_step':
        twice = keys.isin(keys[twice])
    if twice.any():
        doubled = scenes[twice].assign(key=keys[twice]).sort_values(['key', 'sensor', 'path'])
        skipped.add(Reason.AMBIGUOUS, *doubled['path'])
        scenes, keys = scenes[~twice], keys[~twice]
    rows = {
        sensor: scenes.index[(scenes['sensor'] == sensor).to_numpy()].to_numpy()
        for sensor in ('s1', 's2')
    }
    if len(sensors) == 1:
        (sensor,) = sensors
        chosen = rows[sensor][np.argsort(keys[rows[sensor]].to_numpy(), kind='stable')]
        none = np.full(len(chosen), -1)
        return pd.DataFrame({'s1': none, 's2': none} | {sensor: chosen})
    if pairing == 'time_step':
        return _by_key(scenes, keys, rows, skipped)
    return _nearest(scenes, rows, skipped)


def _by_key(
    scenes: pd.DataFrame,
    keys: pd.Series,
    rows: dict[str, npt.NDArray[np.int64]],
    skipped: Skipped,
) -> pd.DataFrame:
    """Pairs of the same key, of which each sensor has one file at most."""
    s1_keys, s2_keys = (keys[rows[sensor]].to_numpy() for sensor in ('s1', 's2'))
    _, first, second = np.intersect1d(s1_keys, s2_keys, assume_unique=True, return_indices=True)
    for reason, sensor, matched in (
        (Reason.ONLY_S1, 's1', first),
        (Reason.ONLY_S2, 's2', second),
    ):
        lone = np.delete(rows[sensor], matched)
        if len(lone):
            ordered = lone[np.argsort(keys[lone].to_numpy())]
            skipped.add(reason, *scenes['path'][ordered])
    return pd.DataFrame({'s1': rows['s1'][first], 's2': rows['s2'][second]})


def _nearest(
    scenes: pd.DataFrame, rows: dict[str, npt.NDArray[np.int64]], skipped: Skipped
) -> pd.DataFrame:
    """Each S2 with the S1 of its patch that is nearest in time."""
    frame = scenes[['date']].assign(
        place=scenes.groupby(_PLACE, sort=True).ngroup(), row=scenes.index
    )
    s1, s2 = (frame.loc[rows[sensor]].sort_values(['date', 'row']) for sensor in ('s1', 's2'))
    merged = pd.merge_asof(
        s2, s1, on='date', by='place', direction='nearest', suffixes=('_s2', '_s1')
    )
    lone = merged['row_s1'].isna()
    if lone.any():
        skipped.add(Reason.ONLY_S2, *scenes['path'][sorted(merged['row_s2'][lone])])
    merged = merged[~lone]
    pairs = pd.DataFrame({'s1': merged['row_s1'].astype(np.int64), 's2': merged['row_s2']})
    order = scenes.loc[pairs['s2'], _KEY].reset_index(drop=True).sort_values(_KEY).index
    return pairs.iloc[order].reset_index(drop=True)
