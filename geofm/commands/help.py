"""Help texts of the commands."""

import argparse
import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, override

from jsonargparse import DefaultHelpFormatter

#: Options that all commands have, and which are listed after those of the command.
_SHARED = ('help', 'config', 'print_config')

#: Placeholders of values by type.
_METAVARS: dict[Any, str] = {int: 'INT', float: 'FLOAT', Path: 'PATH'}


class HelpFormatter(DefaultHelpFormatter):
    """Formatter of help texts that shows options as they are typed.

    A switch has no value, a list has several values, and placeholders such as PATH stand in place
    of Python types. The options that all commands have in common come last.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Initialize a new HelpFormatter instance.

        Args:
            *args: Arguments of argparse's formatter.
            **kwargs: Further arguments.
        """
        super().__init__(*args, **kwargs)
        self._config: str | None = None

    @override
    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add the arguments of a group, except those that all commands have in common.

        Args:
            actions: The arguments.
        """
        for action in actions:
            if action.dest not in _SHARED:
                self.add_argument(_as_typed(action))
            elif action.dest == 'config' and action.help != argparse.SUPPRESS:
                self._config = action.help

    @override
    def format_help(self) -> str:
        """Format the help text, with a section of the options that all commands have in common.

        Returns:
            The text.
        """
        self.start_section('options of all commands')
        for action in _shared_options(self._config):
            self.add_argument(action)
        self.end_section()
        return super().format_help()

    @override
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        if action.required and action.option_strings:
            return f'{text} (required)'
        default = action.default
        if isinstance(default, list | tuple):
            default = ' '.join(map(str, default))
        unset = default is None or default is False or default in ('', argparse.SUPPRESS)
        return text if unset or not action.option_strings else f'{text} (default: {default})'

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split('\n\n')
        return '\n\n'.join(
            super(HelpFormatter, self)._fill_text(p, width, indent) for p in paragraphs
        )


def describe(function: Callable[..., Any]) -> str:
    """Return the description of a command.

    Args:
        function: The function that runs the command.

    Returns:
        Its docstring up to the arguments.
    """
    return (inspect.getdoc(function) or '').partition('\n\nArgs:')[0]


def usage(name: str, function: Callable[..., Any], many: bool) -> str:
    """Return the usage line of a command.

    Args:
        name: Name of the command.
        function: The function that runs it.
        many: Whether the first argument takes several values.

    Returns:
        The command with its required arguments, e.g. ``geofm change BEFORE AFTER [OPTIONS]``. The
        first argument, if it is no switch, may be given by position even if it is optional.
    """
    words = ['geofm', name]
    for i, parameter in enumerate(inspect.signature(function).parameters.values()):
        placeholder = parameter.name.upper()
        if parameter.default is not parameter.empty:
            words += [f'[{placeholder}]'] if i == 0 and parameter.annotation is not bool else []
        elif parameter.kind is parameter.KEYWORD_ONLY:
            words.append(f'--{parameter.name} {placeholder}')
        elif i == 0 and many:
            words.append('{0} [{0} ...]'.format(placeholder.removesuffix('S')))
        else:
            words.append(placeholder)
    return ' '.join([*words, '[OPTIONS]'])


def _shared_options(config: str | None) -> list[argparse.Action]:
    """Return the options that all commands have in common, for display only."""
    parser = argparse.ArgumentParser()
    if config is not None:
        parser.add_argument('--config', metavar='FILE', help=config)
        text = 'Print the options as YAML, for --config, and exit.'
        parser.add_argument('--print_config', action='store_true', help=text)
    text = 'YAML file that defines further sensors; may be given several times.'
    parser.add_argument('--sensors', metavar='FILE', help=text)
    parser.add_argument('--debug', action='store_true', help='Print the traceback of an error.')
    first, *others = parser._actions
    first.help = 'Show this help message and exit.'
    return [*others, first]


def _as_typed(action: argparse.Action) -> argparse.Action:
    """Return a copy of an argument as it is given on the command line."""
    kind: Any = getattr(action, '_typehint', None) or action.type
    name = action.dest.rpartition('.')[2].upper()
    placeholder, several = _placeholder(kind, name)
    shown = copy.copy(action)
    shown.metavar = placeholder
    shown.nargs = '+' if several else None
    # '--bands+' appends to a list.
    shown.option_strings = [option for option in action.option_strings if option[-1] != '+']
    if action.dest.endswith('.help'):
        shown.metavar = 'CLASS'
        shown.nargs = action.nargs
    elif kind is bool:
        shown.nargs = 0
    elif any(map(is_dataclass, (kind, *get_args(kind)))):
        # Each field is an option.
        shown.option_strings = [f'{option}.KEY' for option in shown.option_strings]
        shown.metavar = 'VALUE'
    elif not shown.option_strings:
        shown.metavar = name.removesuffix('S') if several else name
    return shown


def _placeholder(kind: Any, name: str) -> tuple[str, bool]:
    """Return the placeholder of a value, and whether several values may be given."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _placeholder(next(arg for arg in args if arg is not NoneType), name)
    if origin is Literal:
        return '{' + ','.join(map(str, args)) + '}', False
    if origin is dict:
        value, several = _placeholder(args[1], 'VALUE')
        return f'KEY=[{value},...]' if several else f'KEY={value}', False
    if origin in (list, Sequence):
        single = name.removesuffix('S') if name.endswith('S') else 'VALUE'
        item, _ = _placeholder(args[0], single)
        # The help text of a list names its choices.
        return single if item.startswith('{') else item, True
    return _METAVARS.get(kind, name), False
