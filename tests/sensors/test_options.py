"""The option --sensors, and the key in training configurations."""

from pathlib import Path

import pytest

import geofm.commands.data
import geofm.commands.fit
from geofm.cli import main
from geofm.sensors import SENSORS

HYPER = """
hyper:
  title: Hyperion
  quantity: reflectance
  unit: DN
  scale: 0.0001
  bands: [{name: first, mean: 1000, std: 400}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'sensors.yaml'
    path.write_text(HYPER)
    return path


def test_a_command_registers_sensors_first(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def sample_data(dest: Path) -> None:
        seen.extend(SENSORS)

    monkeypatch.setattr(geofm.commands.data, 'sample_data', sample_data)
    main(['sample-data', str(tmp_path / 'a'), '--sensors', str(file)])
    main(['sample-data', f'--sensors={file}', str(tmp_path / 'a')])
    assert seen.count('hyper') == 2
    with pytest.raises(SystemExit, match=r'geofm sample-data: .*gone.yaml: no such file'):
        main(['sample-data', 'a', f'--sensors={tmp_path}/gone.yaml'])


@pytest.mark.parametrize('how', ['option', 'key', 'list'])
def test_training_registers_sensors_first(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def stop(_: object) -> None:
        raise ValueError(f'known are {list(SENSORS)}')

    monkeypatch.setattr(geofm.commands.fit, 'adopt_model', stop)
    config = tmp_path / 'config.yaml'
    top = {'option': '', 'key': f'sensors: {file}\n', 'list': f'sensors: [{file}]\n'}[how]
    config.write_text(
        f'{top}model: {{class_path: Classification}}\n'
        'data: {class_path: EuroSATDataModule}\ntrainer: {accelerator: cpu}\n'
    )
    more = ['--sensors', str(file)] if how == 'option' else []
    with pytest.raises(SystemExit, match=r"known are .*'hyper'"):
        main(['fit', '--config', str(config), *more])
