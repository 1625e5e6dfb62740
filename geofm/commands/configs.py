"""The command that lists and copies the configurations that are shipped with the package."""

import re
import shutil
from pathlib import Path

from geofm.atomic import atomic_file
from geofm.printing import counted, say
from geofm.suggestions import did_you_mean

#: Folder of the shipped configurations: a link to ``configs`` in a clone, a folder in a wheel.
SHIPPED = Path(__file__).parents[1] / 'configs'

#: Options whose value may be the name of a shipped file.
OPTIONS = ('-c', '--config', '--layout', '--sensors')


def configs(name: str | None = None, copy: Path | None = None) -> None:
    """List or copy the configurations that are shipped with geofm.

    The options --config, --layout and --sensors of all commands also take the name of a shipped
    file, for example --config pretrain/quickstart. A file of that name on disk takes precedence.

    Args:
        name: Configuration to list or copy, for example pretrain/quickstart; by default all. Also
            accepted as a positional argument.
        copy: Folder to copy the files to, with their relative paths. No file is overwritten.
            Without this option, names and descriptions are listed.

    Raises:
        UsageError: If no configuration has this name.
        FileExistsError: If a file to be written exists.
    """
    names = shipped_names()
    if name is not None:
        key = _plain(name)
        if key not in names:
            from geofm.messages import UsageError

            raise UsageError(
                f"no shipped configuration '{name}'{did_you_mean(key, names)}; "
                '`geofm configs` lists them'
            )
        names = {key: names[key]}
    if copy is None:
        width = max(map(len, names))
        for key, path in names.items():
            say(f'{key:<{width}}  {description(path)}')
        return
    targets = {path: copy / path.relative_to(SHIPPED) for path in names.values()}
    if existing := [target for target in targets.values() if target.exists()]:
        raise FileExistsError(f'{existing[0]} exists: give --copy another folder, or remove it')
    for path, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as part:
            shutil.copyfile(path, part)
    say(f'{counted(len(targets), "file")} in {copy}')


def shipped_names() -> dict[str, Path]:
    """Find the shipped configurations.

    Returns:
        Paths by name: the path below :data:`SHIPPED`, without ``.yaml``.
    """
    files = [*SHIPPED.rglob('*.yaml'), *SHIPPED.rglob('*.json')]
    return {_plain(path.relative_to(SHIPPED).as_posix()): path for path in sorted(files)}


def find_config(value: str) -> str:
    """Find the shipped configuration that the value of an option names.

    Args:
        value: A path, or the name of a shipped configuration: ``pretrain/quickstart``, or
            ``configs/pretrain/quickstart.yaml`` as in a clone of the repository.

    Returns:
        The path of the shipped file if *value* names one and does not exist as a path; otherwise
        *value*.
    """
    if not value or Path(value).exists():
        return value
    return str(shipped_names().get(_plain(value), value))


def find_configs(args: list[str]) -> list[str]:
    """Replace names of shipped configurations in the arguments of a command.

    Args:
        args: The arguments.

    Returns:
        The arguments, with paths in place of the names after :data:`OPTIONS`.
    """
    found: list[str] = []
    for arg in args:
        option, equals, value = arg.partition('=')
        if equals and option in OPTIONS:
            arg = f'{option}={find_config(value)}'
        elif found and found[-1] in OPTIONS:
            arg = find_config(arg)
        found.append(arg)
    return found


def check_configs(args: list[str]) -> None:
    """Check that the values of ``--config`` are files.

    Args:
        args: Arguments of a command, as :func:`find_configs` returns them.

    Raises:
        UsageError: If a value is neither a file nor the name of a shipped configuration.
    """
    from geofm.messages import UsageError, option_values

    for option, value in option_values(args, ('-c', '--config')):
        if not Path(value).is_file():
            guess = did_you_mean(_plain(value), shipped_names())
            raise UsageError(
                f'{option} {value}: neither a file nor a shipped configuration{guess}; '
                '`geofm configs` lists them'
            )


def _plain(name: str) -> str:
    return name.removeprefix('configs/').removesuffix('.yaml')


def description(path: Path) -> str:
    """Read the description of a configuration.

    Args:
        path: The file.

    Returns:
        The first sentence of the comment at its top; empty if there is none.
    """
    if path.suffix != '.yaml':
        return ''
    comment = []
    for line in path.read_text(encoding='utf-8').splitlines():
        if not line.startswith('#') or line == '#':
            break
        comment.append(line.removeprefix('#').strip())
    # The full stop of an abbreviation ends no sentence.
    return re.split(r'(?<!\be\.g)(?<!\bi\.e)\. ', ' '.join(comment))[0].removesuffix('.')
