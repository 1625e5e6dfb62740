import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = runpy.run_path(str(ROOT / 'experiments' / 'tables.py'))


@pytest.mark.parametrize('page', TABLES['pages'](), ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert TABLES['filled'](text) == text, 'run python experiments/tables.py'
