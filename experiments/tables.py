"""Insert the tables of `experiments/results/` into README and docs.

    python experiments/tables.py

The content of `experiments/results/NAME.md` is inserted between the markers
`<!-- results: NAME -->` and `<!-- /results -->` of a page.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r'(<!-- results: ([\w-]+) -->\n).*?(<!-- /results -->)', re.DOTALL)


def pages() -> list[Path]:
    """Return the pages with tables: README and docs."""
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def filled(page: str) -> str:
    """Return a page with the tables of the results inserted; missing tables stay empty."""

    def table(match: re.Match[str]) -> str:
        path = ROOT / 'experiments' / 'results' / f'{match[2]}.md'
        return match[1] + (path.read_text() if path.exists() else '') + match[3]

    return _MARKED.sub(table, page)


def main() -> None:
    """Rewrite the pages whose tables have changed."""
    for path in pages():
        text = path.read_text()
        if filled(text) != text:
            path.write_text(filled(text))
            print(path.relative_to(ROOT))


if __name__ == '__main__':
    main()
