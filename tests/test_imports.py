"""Imports between the packages of geofm: downwards, without circles, and of public names only."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

#: Packages and modules of geofm from the top down: an import points to a later layer.
LAYERS = (
    ('cli',),
    ('commands',),
    ('messages',),
    ('deploy', 'maps'),
    ('callbacks',),
    ('checkpoint_io', 'evaluation', 'tasks'),
    ('strategies',),
    ('datamodules', 'losses'),
    ('models',),
    ('datasets',),
    ('sample',),
    ('sen12ms',),
    ('transforms',),
    ('sensor_rasters', 'stac_assets'),
    ('legend', 'lonlat', 'rasters', 'stretch', 'units', 'validity'),
    ('device', 'grid', 'sensors'),
    ('atomic',),
    ('locking', 'printing', 'suggestions'),
)

#: Libraries of the extras in pyproject.toml.
EXTRAS = frozenset(
    [
        'litdata',
        'morecantile',
        'obstore',
        'onnx',
        'onnxruntime',
        'onnxscript',
        'peft',
        'rio_tiler',
        's2cloudless',
        'torchgeo_bench',
        'transformers',
        'xformers',
    ]
)


class Import(NamedTuple):
    """An import of a name, or of a module where name is None."""

    module: str
    name: str | None
    line: int


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {name_of(file): file for file in (ROOT / 'geofm').rglob('*.py')}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}


def public_names(name: str) -> set[str]:
    """Names in the __all__ of a package."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            return set(ast.literal_eval(node.value))
    return set()


def imports(name: str) -> Iterator[Import]:
    """Imports of geofm by a module, those within functions included."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] == 'geofm':
                    yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'geofm':
            assert node.module is not None
            for alias in node.names:
                module = f'{node.module}.{alias.name}'
                if module in FILES and alias.name not in public_names(node.module):
                    yield Import(module, None, node.lineno)
                else:
                    yield Import(node.module, alias.name, node.lineno)


IMPORTS = {name: list(imports(name)) for name in FILES}


def imported_at_once(name: str) -> set[str]:
    """Names of the modules that importing a module imports, other libraries included."""
    found = set()
    for node in TREES[name].body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def needs_extra(name: str) -> bool:
    return any(module.partition('.')[0] in EXTRAS for module in imported_at_once(name))


def package(name: str) -> str:
    """The part of geofm that a module belongs to; empty for geofm itself."""
    return name.partition('.')[2].partition('.')[0]


def test_no_circles() -> None:
    graph = {
        name: {found.module for found in IMPORTS[name] if found.module in FILES} - {name}
        for name in FILES
    }
    # Raises CycleError, which names the modules of a circle.
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(FILES) > 200


def test_imports_point_downwards() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert {package(name) for name in FILES} - {'', '__main__'} == set(layer)
    upwards = [
        f'{FILES[name].relative_to(ROOT)}:{found.line} imports {found.module}'
        for name in FILES
        if package(name) in layer
        for found in IMPORTS[name]
        if package(found.module) not in ('', package(name))
        and layer[package(found.module)] <= layer[package(name)]
    ]
    assert not upwards, '\n'.join(upwards)


def test_packages_use_the_public_names_of_each_other() -> None:
    deep = []
    for name, file in FILES.items():
        for found in IMPORTS[name]:
            if package(found.module) in ('', package(name), 'commands'):
                # The command line imports the module of a command when it is called.
                continue
            is_package = FILES[found.module].name == '__init__.py'
            if found.name is None:
                allowed = is_package or found.module.count('.') == 1
            else:
                allowed = not is_package or found.name in public_names(found.module)
                allowed &= is_package or found.module.count('.') == 1
            # No package may import these, so that geofm works without its extras.
            allowed |= needs_extra(found.module)
            if not allowed:
                deep.append(f'{file.relative_to(ROOT)}:{found.line}: {found.module} {found.name}')
    assert not deep, '\n'.join(deep)


def test_packages_import_without_the_extras() -> None:
    reached, left = set(), {name for name in FILES if name.count('.') == 1}
    left = {name for name in left if FILES[name].name == '__init__.py'}
    while left:
        name = left.pop()
        reached.add(name)
        assert not needs_extra(name), f'{name} is imported by the packages, and needs an extra'
        parents = {module.rpartition('.')[0] for module in imported_at_once(name)}
        left |= (imported_at_once(name) | parents) & FILES.keys() - reached
    assert len(reached) > 150
    assert any(needs_extra(name) for name in FILES)


@pytest.mark.parametrize('name', [n for n in FILES if FILES[n].name == '__init__.py'])
def test_public_names_are_those_that_are_imported(name: str) -> None:
    bound = {
        alias.asname or alias.name
        for node in TREES[name].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            bound.add(ast.unparse(target))
    assert public_names(name) <= bound
