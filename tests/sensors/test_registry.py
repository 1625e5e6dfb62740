import re
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from geofm.datasets.seeded import Seeded
from geofm.sensors import (
    BANDS,
    RGB,
    SENSORS,
    SENTINEL1,
    SENTINEL2,
    Band,
    BandError,
    Sensor,
    SensorError,
    bands_of,
    canonical_bands,
    canonical_order,
    check_bands,
    date_columns,
    load_sensors,
    reference_sensor,
    register_sensor,
    sensor,
    sensor_channels,
)
from geofm.sensors.builtin import BUILTIN

PLANET = """
planet:
  title: PlanetScope
  quantity: reflectance
  unit: DN
  scale: 1e-4
  bands:
    - {name: blue, common_name: blue, wavelength: 0.49, gsd: 3, mean: 560, std: 420}
    - {name: green, common_name: green, mean: 800, std: 450}
    - {name: red, common_name: red, mean: 800, std: 600}
    - {name: nir, common_name: nir, mean: 2600, std: 1100, aliases: [B8]}
"""


@pytest.fixture
def planet(tmp_path: Path) -> Sensor:
    (tmp_path / 'sensors.yaml').write_text(PLANET)
    assert load_sensors(tmp_path / 'sensors.yaml') == ('planet',)
    return SENSORS['planet']


def test_order_is_that_of_registration(planet: Sensor) -> None:
    # Further built-in sensors come after these.
    assert list(SENSORS)[:6] == ['s1', 's2', 's2l2a', 'landsat', 'dem', 'rgb']
    assert list(SENSORS) == [*(sensor.name for sensor in BUILTIN), 'planet']
    assert canonical_order(['planet', 'dem', 's1', 'dem']) == ('s1', 'dem', 'planet')


def test_channels_of_s1_and_s2_have_the_names_of_torchgeo() -> None:
    assert SENTINEL1.band_names + SENTINEL2.band_names == BANDS
    assert check_bands(['s2.B02', 'VV', 's2l2a.B02']) == ('B02', 'VV', 's2l2a.B02')


def test_channels_of_other_sensors_are_qualified(planet: Sensor) -> None:
    assert planet.band_names == ('planet.blue', 'planet.green', 'planet.red', 'planet.nir')
    assert bands_of(['planet', 's1']) == ('VV', 'VH', *planet.band_names)
    assert canonical_bands(['planet.nir', 's1.VH', 'planet.red']) == (
        'VH', 'planet.red', 'planet.nir',
    )  # fmt: skip
    assert sensor_channels(['planet.nir', 'VV', 'planet.blue']) == {'s1': [1], 'planet': [0, 2]}


def test_a_band_is_found_by_name_common_name_and_alias(planet: Sensor) -> None:
    for name in ('nir', 'NIR', 'planet.nir', 'b8'):
        assert planet.find_band(name) == 'planet.nir'
    assert planet.find_band('B02') is None
    assert SENTINEL2.find_band('rededge1') == SENTINEL2.find_band('B5') == 'B05'
    assert SENSORS['landsat'].find_band('SR_B4') == 'landsat.B04'


def test_defaults_follow_the_quantity(planet: Sensor) -> None:
    assert planet.limits == (-1000.0, 65535.0)
    assert planet.photometry == SENTINEL2.photometry
    assert planet.histogram == SENTINEL2.histogram
    assert planet.drawing.bands == ('red', 'green', 'blue')
    assert planet.picture_bands == ('planet.red', 'planet.green', 'planet.blue')
    backscatter = Sensor('x1', 'X-band', (Band('HH', -9.0, 5.0),), 'backscatter', 'dB')
    assert backscatter.photometry == SENTINEL1.photometry
    assert not backscatter.measures_zero
    assert backscatter.drawing.channels == ('HH',)


def test_a_picture_may_show_the_difference_of_two_bands() -> None:
    assert SENTINEL1.drawing.terms == (('VV', None), ('VH', None), ('VV', 'VH'))
    assert SENTINEL1.drawing.bands == ('VV', 'VH')


@pytest.mark.parametrize('key', [sensor.name for sensor in BUILTIN])
def test_definitions_survive_yaml(key: str) -> None:
    plain = yaml.safe_load(yaml.safe_dump(SENSORS[key].to_dict()))
    assert Sensor.from_dict(plain) == SENSORS[key]
    # E.g. from a checkpoint with the same sensor.
    assert register_sensor(Sensor.from_dict(plain)) == SENSORS[key]


def test_two_definitions_with_the_same_key_are_an_error(planet: Sensor) -> None:
    other = Sensor.from_dict({**planet.to_dict(), 'title': 'Another', 'scale': 1.0})
    with pytest.raises(SensorError, match=r"'PlanetScope'.*'Another' differs in title, scale"):
        register_sensor(other)
    unqualified = Sensor.from_dict({**SENTINEL2.to_dict(), 'name': 'mine'})
    with pytest.raises(SensorError, match="the channel 'B01' is one of 's2' already"):
        register_sensor(unqualified)
    assert 'mine' not in SENSORS


def test_dates_have_the_columns_of_the_sensors() -> None:
    assert date_columns(['s2']) == date_columns(['s2', 's1']) == ('s1', 's2')
    assert date_columns(['dem', 's1']) == ('s1', 'dem')
    assert date_columns(['rgb']) == ('rgb',)


def test_the_reference_grid_is_that_of_sentinel2_or_the_first_that_is_not_static() -> None:
    assert reference_sensor(['s1', 's2', 'dem']) == 's2'
    assert reference_sensor(['dem', 's1']) == 's1'
    assert reference_sensor(['dem', 'rgb']) == 'rgb'
    assert reference_sensor(['dem']) == 'dem'


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(SensorError, match=r"unknown sensor 's2l2'.*did you mean 's2l2a'"):
        sensor('s2l2')
    with pytest.raises(BandError, match=r"did you mean 'dem.elevation'"):
        check_bands(['elevation'])
    with pytest.raises(BandError, match=r"did you mean 'rgb.red'"):
        check_bands(['red'])
    with pytest.raises(BandError, match='twice'):
        check_bands(['B02', 's2.B02'])
    none: list[str] = []
    for keys in (none, 's1'):
        with pytest.raises(SensorError):
            canonical_order(keys)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('[1, 2]', 'must map keys of sensors'),
        ('a: {', 'cannot be read as YAML'),
        ('planet: 3', "sensor 'planet': must be a key and a mapping"),
        (PLANET.replace('  title: PlanetScope\n', ''), "the field 'title' is missing"),
        (PLANET.replace('quantity', 'quantty'), "unknown field 'quantty'; did you mean 'quantity'"),
        (PLANET.replace('reflectance', 'colour'), 'quantity must be one of reflectance,'),
        (PLANET.replace('1e-4', 'tenth'), "scale must be a number, not 'tenth'"),
        (PLANET.replace('std: 420', 'std: 0'), r'bands\[0\]: band blue: .* std positive'),
        (PLANET.replace('{name: green, ', '{'), r"bands\[1\]: the field 'name' is missing"),
        (PLANET.replace('name: green', 'name: Blue'), r"bands given twice: \['blue'\]"),
        (PLANET.replace('[B8]', 'B8'), r"aliases must be a list, not 'B8'"),
        (PLANET + '  limits: [3, 2]', r'limits \[3.0, 2.0\] must be .lowest, highest.'),
        (PLANET + '  resampling: best', 'resampling .best. must be one of nearest'),
        (PLANET + '  drawing: {channels: [swir], title: x}', r"unknown bands \['swir'\]"),
        (PLANET + '  drawing: {channels: [red, nir], title: x}', 'one or three channels'),
        (PLANET + '  photometry: {gain: [1, 0]}', 'planet: photometry: gain .* must be .lowest,'),
        (PLANET + '  static: maybe', "static must be true or false, not 'maybe'"),
        (PLANET.replace('planet:', 'Planet 4:'), 'a key consists of lower-case letters'),
    ],
)
def test_wrong_definitions_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / 'sensors.yaml'
    file.write_text(text)
    with pytest.raises(SensorError, match=f'^{re.escape(str(file))}: .*{message}') as info:
        load_sensors(file)
    assert '\n' not in str(info.value)
    assert 'planet' not in SENSORS


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(RGB.to_dict())), plain_values)
def test_any_value_of_a_field_is_valid_or_a_sensor_error(field: str, value: Any) -> None:
    with suppress(SensorError):
        assert isinstance(Sensor.from_dict({**RGB.to_dict(), field: value}), Sensor)


def title_of_planet(dataset: Seeded | None) -> str | None:
    return SENSORS['planet'].title if 'planet' in SENSORS else None


def test_a_new_worker_knows_the_added_sensors(
    planet: Sensor, forkserver: ForkServerContext
) -> None:
    dataset: Any = TensorDataset(torch.zeros(1))
    with forkserver.Pool(1) as pool:
        assert pool.apply(title_of_planet, (None,)) is None
        assert pool.apply(title_of_planet, (Seeded(dataset),)) == 'PlanetScope'
