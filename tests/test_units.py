import warnings

import numpy as np
import pytest

from geofm.sensors import SENTINEL1, SENTINEL2
from geofm.units import UnitWarning, UnitWatch, wrong_unit

RNG = np.random.default_rng(0)
DB = np.stack([RNG.normal(-11, 4, (64, 64)), RNG.normal(-19, 5, (64, 64))])
DN = RNG.gamma(2, 800, (13, 64, 64)) + 100
DAMAGE = np.array([3e38, -5.0, 1e-3])


@pytest.mark.parametrize(
    ('values', 'sensor', 'said'),
    [
        (DB, SENTINEL1, None),
        (10 ** (DB / 10), SENTINEL1, 'linear power'),
        (10 ** (DB / 10) - 1e-3, SENTINEL1, 'linear power'),
        (RNG.integers(30, 700, (2, 64, 64)), SENTINEL1, 'raw digital numbers'),
        (DN, SENTINEL2, None),
        (DN / 1e4, SENTINEL2, 'reflectance'),
        (DN + 1000, SENTINEL2, 'baseline'),
        (DN * 1e4, SENTINEL2, 'beyond the range'),
        (DN[:0], SENTINEL2, None),
    ],
)
def test_units_are_detected_from_values(
    values: np.ndarray, sensor: object, said: str | None
) -> None:
    # A few damaged pixels have no effect.
    for more in (np.array([]), DAMAGE if values.size else np.array([])):
        found = wrong_unit(np.concatenate([values.ravel(), more]), sensor)  # type: ignore[arg-type]
        assert (found is None) == (said is None)
        assert said is None or said in str(found)


def test_there_is_one_warning_per_sensor() -> None:
    images = np.concatenate([10 ** (DB / 10), DN + 1000])[None].repeat(4, 0)
    watch = UnitWatch((*SENTINEL1.band_names, *SENTINEL2.band_names), 'here')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UnitWarning)
        for _ in range(20):
            watch.look(images)
    assert len(caught) == 2
    assert 'here: values of Sentinel-1 GRD (mostly ' in str(caught[0].message)
    assert watch.is_done


def test_fill_is_ignored() -> None:
    image = np.concatenate([DB, DN])
    image[:, :40] = 0
    image[:, 40:50] = np.nan
    image[:2, 50:60] = -9999
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        watch = UnitWatch((*SENTINEL1.band_names, *SENTINEL2.band_names), 'here', images=3)
        for _ in range(3):
            watch.look(image)
    assert watch.is_done
    shifted = np.where(image > 0, image + 1000, image)
    with pytest.warns(UnitWarning, match='baseline'):
        UnitWatch(SENTINEL2.band_names, 'here').look(shifted[None, 2:].repeat(4, 0))
