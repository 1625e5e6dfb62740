"""Commands that look into a training run."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from geofm.tasks.nonfinite import replay as replay_step


def replay(dump: Path, device: str = 'cpu') -> None:
    """Do a training step again whose loss or gradient was not finite.

    Args:
        dump: File `nonfinite-step....pt` that the run wrote when it stopped.
        device: Where to compute, e.g. cuda: on that of the run for the same rounding.
    """
    table = Table('of the step', 'value')
    for name, value in replay_step(dump, device).items():
        table.add_row(name, f'{value:.6g}')
    Console().print(table)
