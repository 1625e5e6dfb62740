"""The command that replays a training step."""

from pathlib import Path
from typing import Any


def replay(dump: Path, device: str = 'cpu', run: Path | None = None) -> None:
    """Repeat a training step whose loss or gradient was not finite.

    Args:
        dump: File nonfinite-step*.pt that the run wrote when it stopped.
        device: Device to compute on, e.g. cuda. Rounding is the same as in the run only on the same
            type of device.
        run: Configuration file of the run. Needed only for a run with a frozen `teacher`
            (distillation), since a dump contains no paths of files.
    """
    from rich.console import Console
    from rich.table import Table

    from geofm.tasks import replay as replay_step

    table = Table('quantity', 'value')
    for name, value in replay_step(dump, device, _teacher(run)).items():
        table.add_row(name, f'{value:.6g}')
    Console().print(table)


def _teacher(config: Path | None) -> dict[str, Any]:
    """Return the argument `teacher` of the task in a configuration."""
    if config is None:
        return {}
    import yaml

    from geofm.tasks import Teacher

    content = yaml.safe_load(config.read_text())
    try:
        given = content['model']['init_args']['teacher']
    except (KeyError, TypeError) as error:
        raise ValueError(f'{config}: model.init_args has no teacher') from error
    return {'teacher': Teacher(**given)}
