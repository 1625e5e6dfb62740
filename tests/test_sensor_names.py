"""Only the registry and the readers of SEN12MS contain keys of sensors."""

import ast
from pathlib import Path

import pytest

import geofm
from geofm.sensors.builtin import BUILTIN

PACKAGE = Path(geofm.__file__).parent
KEYS = frozenset(sensor.name for sensor in BUILTIN)

#: What may name sensors: the registry, the readers of SEN12MS-CR-TS and SEN12MS-CR with their data
#: modules and the parsing of their file names, and the generated sample data.
ALLOWED = (
    'sensors/',
    'datasets/sen12ms',
    'datamodules/sen12mscr',
    'sen12ms/',
    'sample/',
)


def sensor_names(source: str) -> list[tuple[int, str]]:
    """Return lines and values of string constants that are keys of sensors, except docstrings."""
    tree = ast.parse(source)
    scopes = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, scopes) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in KEYS
        and id(node) not in docstrings
    ]


def test_only_the_registry_and_the_readers_of_sen12ms_name_sensors() -> None:
    named = [
        f'{path.relative_to(PACKAGE)}:{line}: {key!r}'
        for path in sorted(PACKAGE.rglob('*.py'))
        if not path.relative_to(PACKAGE).as_posix().startswith(ALLOWED)
        for line, key in sensor_names(path.read_text())
    ]
    assert not named, '\n'.join(['sensors named in code:', *named])


@pytest.mark.parametrize(
    ('source', 'found'),
    [
        ("x = {'s1': 1}", [(1, 's1')]),
        ("def f(key='dem'):\n    'rgb'\n    return key == 's2l2a'", [(1, 'dem'), (3, 's2l2a')]),
        ("class A:\n    's2'\n    landsat = 's2_bands'", []),
    ],
)
def test_names_are_found(source: str, found: list[tuple[int, str]]) -> None:
    assert sorted(sensor_names(source)) == found
