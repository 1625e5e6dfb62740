"""Table of ratios and output files for benchmarks with several rounds."""

import json
import statistics
from pathlib import Path
from typing import Any

#: Folder of the results.
RESULTS = Path(__file__).parents[1] / 'results'


def ratio_table(
    what: str,
    unit: str,
    figures: dict[str, list[float]],
    baseline: str,
    ratio: str,
    digits: int = 2,
) -> str:
    """Return a Markdown table of medians and of median ratios within a round.

    Args:
        what: Title of the first column.
        unit: Title of the figures' column.
        figures: One value per round, by row.
        baseline: Row that the others are divided by.
        ratio: Title of the ratios' column, which says whether higher or lower is faster.
        digits: Decimals of the medians.

    Returns:
        The table.
    """
    lines = [f'| {what} | {unit} | {ratio} | range |', '|---|---:|---:|---:|']
    for name, values in figures.items():
        ratios = [value / base for value, base in zip(values, figures[baseline], strict=True)]
        lines.append(
            f'| {name} | {statistics.median(values):.{digits}f} | {statistics.median(ratios):.2f} '
            f'| {min(ratios):.2f} to {max(ratios):.2f} |'
        )
    return '\n'.join(lines)


def write_results(folder: Path, name: str, about: dict[str, Any], text: str) -> None:
    """Write ``<name>.json`` and ``<name>.md`` atomically.

    Args:
        folder: Output folder.
        name: Name without suffix.
        about: Content of the JSON file.
        text: The table.
    """
    write_text(folder / f'{name}.json', json.dumps(about, indent=2))
    write_text(folder / f'{name}.md', text)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: The file.
        text: Its content without the final newline.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.{path.name}.part')
    beside.write_text(text + '\n')
    beside.replace(path)
