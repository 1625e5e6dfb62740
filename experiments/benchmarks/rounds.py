"""What benchmarks of several rounds share: the table of their ratios, and writing the results."""

import json
import statistics
from pathlib import Path
from typing import Any

#: Where results go.
RESULTS = Path(__file__).parents[1] / 'results'


def ratio_table(
    what: str, unit: str, figures: dict[str, list[float]], baseline: str, digits: int = 2
) -> str:
    """Markdown table of medians, and of the medians of the ratios within a round.

    Args:
        what: Title of the first column.
        unit: Title of the figures' column.
        figures: A figure for each round, by what was measured.
        baseline: What the others are divided by.
        digits: Decimals of the medians.

    Returns:
        The table.
    """
    lines = [f'| {what} | {unit} | ratio | range of ratio |', '|---|---:|---:|---:|']
    for name, values in figures.items():
        ratios = [value / base for value, base in zip(values, figures[baseline], strict=True)]
        lines.append(
            f'| {name} | {statistics.median(values):.{digits}f} | {statistics.median(ratios):.2f} '
            f'| {min(ratios):.2f} to {max(ratios):.2f} |'
        )
    return '\n'.join(lines)


def write_results(folder: Path, name: str, about: dict[str, Any], text: str) -> None:
    """Write ``<name>.json`` and ``<name>.md``, beside and renamed into place.

    Args:
        folder: Where to.
        name: Name without suffix.
        about: What was measured, on what.
        text: The table.
    """
    write_text(folder / f'{name}.json', json.dumps(about, indent=2))
    write_text(folder / f'{name}.md', text)


def write_text(path: Path, text: str) -> None:
    """Write a file beside and rename it into place.

    Args:
        path: The file.
        text: Its content without the last line's end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.{path.name}.part')
    beside.write_text(text + '\n')
    beside.replace(path)
