import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = runpy.run_path(str(ROOT / 'experiments' / 'tables.py'))


@pytest.mark.parametrize('page', TABLES['pages'](), ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert TABLES['filled'](text) == text, 'run python experiments/tables.py'


def test_the_public_api_has_reference_pages() -> None:
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    start = text.index('## Public API')
    listed = text[start : text.index('- the commands', start)]
    # Names of modules are in lower case, those of classes are not.
    modules = set(re.findall(r'`geofm\.([a-z_.]+)(?:\.[A-Z]\w+)?`', listed))
    assert {'models.fusion', 'strategies', 'grid', 'datasets.labels'} < modules
    pages = re.findall(r'geofm\.([\w.]+): reference/\1\.md', (ROOT / 'mkdocs.yml').read_text())
    assert sorted(pages) == pages
    assert set(pages) == modules
