"""Put the tables of `experiments/results/` where README and docs show them.

    python experiments/tables.py

A page marks a place with `<!-- results: NAME -->` and `<!-- /results -->`; between them stands the
content of `experiments/results/NAME.md`.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r'(<!-- results: ([\w-]+) -->\n).*?(<!-- /results -->)', re.DOTALL)


def pages() -> list[Path]:
    """README and docs."""
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def filled(page: str) -> str:
    """A page with its tables as they are in the results; a place without results stays empty."""

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
