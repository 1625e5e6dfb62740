"""Commands that look into a training run."""

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from geofm.tasks.nonfinite import replay as replay_step
from geofm.tasks.teacher import Teacher


def replay(dump: Path, device: str = 'cpu', run: Path | None = None) -> None:
    """Do a training step again whose loss or gradient was not finite.

    Args:
        dump: File `nonfinite-step....pt` that the run wrote when it stopped.
        device: Where to compute, e.g. cuda: on that of the run for the same rounding.
        run: Configuration of the run, where it had a teacher: a dump names no files.
    """
    table = Table('of the step', 'value')
    for name, value in replay_step(dump, device, _files(run)).items():
        table.add_row(name, f'{value:.6g}')
    Console().print(table)


def _files(config: Path | None) -> dict[str, Any]:
    """The teacher of a run."""
    if config is None:
        return {}
    content = yaml.safe_load(config.read_text())
    try:
        given = content['model']['init_args']['teacher']
    except (KeyError, TypeError) as error:
        raise ValueError(f'{config}: no teacher in model.init_args') from error
    return {'teacher': Teacher(**given)}
