"""Error messages of the command line: a few lines that say what is wrong, and where."""

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from geofm.printing import printable
from geofm.suggestions import did_you_mean

#: Maximum number of lines of a message.
LINES = 5

#: Maximum number of characters per line: jsonargparse and PyTorch may print whole configurations.
_WIDTH = 600

_DEBUG = 'run again with --debug for the traceback'

# Errors whose message says what is wrong with the input; others may be bugs.
_EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError)

# The same for errors of other libraries, by name, since importing these takes seconds.
_EXPLAINED_NAMES = ('MisconfigurationException', 'OutOfMemoryError')


class CommandError(SystemExit):
    """A command has failed, and its error message has been printed.

    Args:
        message: The message.
        code: Exit code: 1 for an error while running, 2 for wrong usage.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class UsageError(ValueError):
    """The arguments of a command are wrong or do not go together."""


class ParserError(UsageError):
    """The arguments or the configuration of a command cannot be parsed.

    Args:
        message: The message of jsonargparse.
        parser: The parser that failed.
    """

    def __init__(self, message: str, parser: ArgumentParser) -> None:
        super().__init__(message)
        self.parser = parser


class ShortErrors:
    """Mixin for a parser that omits the usage, which may be 100 lines, from error messages."""

    exit_on_error: bool

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error.

        Args:
            message: The error message.
            ex: The exception that caused it.

        Raises:
            ParserError: Unless a nested value is being parsed: jsonargparse collects its errors.
        """
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        parser: Any = getattr(ex, 'subcommand_parser', None) or self
        raise ParserError(message, parser) from ex


class Parser(ShortErrors, ArgumentParser):
    """jsonargparse's parser with short error messages."""


def fail(
    command: str, error: BaseException, args: Sequence[str] = (), debug: bool = False
) -> NoReturn:
    """Print an error in at most :data:`LINES` lines and end the command.

    Args:
        command: The command, e.g. 'geofm fit'.
        error: The exception.
        args: Arguments of the command.
        debug: Whether to print the traceback first.

    Raises:
        CommandError: Always; its exit code is 2 for a :class:`UsageError` and 1 for others.
    """
    if debug:
        traceback.print_exception(error)
    code = 2 if isinstance(error, UsageError) else 1
    if isinstance(error, ParserError):
        text = _shorten(usage_message(error, args))
    else:
        text = describe(error)
    stop(f'{command}: {text}', code, error)


def stop(message: str, code: int, cause: BaseException | None = None) -> NoReturn:
    """Print a message to stderr and end the command.

    Args:
        message: The message.
        code: Exit code.
        cause: The exception that caused the failure.

    Raises:
        CommandError: Always.
    """
    print(message, file=sys.stderr)
    raise CommandError(message, code) from cause


def describe(error: BaseException) -> str:
    """Describe an error in at most :data:`LINES` lines.

    Args:
        error: The exception.

    Returns:
        The message, without control characters.
    """
    # jsonargparse replaces the error of a constructor by one that lists the types of the argument.
    while error.__cause__ is not None and str(error).startswith('Does not validate against any'):
        error = error.__cause__
    text = _without_traceback(str(error))
    for pattern, explain in _EXPLANATIONS:
        match = re.search(pattern, text)
        if match is not None:
            return _shorten(explain(match))
    if _passed_through(error, 'segmentation_models_pytorch/decoders/dpt/'):
        return (
            'DPT of segmentation-models-pytorch needs patches whose side is a power of two, like '
            '8 or 16 px, and images whose sides are multiples of 32 px'
        )
    explained = isinstance(error, _EXPLAINED) or type(error).__name__ in _EXPLAINED_NAMES
    if explained and text:
        return _shorten(text)
    hint = _DEBUG if text else f'no message; {_DEBUG}'
    return f'{_shorten(f"{type(error).__name__}: {text}", LINES - 1)}\n({hint})'


def _passed_through(error: BaseException, folder: str) -> bool:
    """Return whether a file below a folder is in the traceback of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(folder in Path(frame.filename).as_posix() for frame in frames)


def _without_traceback(text: str) -> str:
    """Remove the traceback from the message of an error in a worker process."""
    if 'Traceback (most recent call last):' not in text:
        return text
    # The error itself starts at the last line of the form 'ValueError: the message'.
    lines = text.rstrip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r'[A-Za-z_][\w.]*(:|$)', line)]
    last = '\n'.join(lines[starts[-1] :]) if starts else lines[-1]
    return last.partition(': ')[2] or last


def _shorten(text: str, most: int = LINES) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) > most:
        lines = [*lines[: most - 1], f'... ({len(lines) - most + 1} more lines; {_DEBUG})']
    texts = [printable(line.expandtabs(2)) for line in lines]
    return '\n'.join(t if len(t) <= _WIDTH else f'{t[:_WIDTH]} ...' for t in texts)


# -- messages of other libraries ---------------------------------------------------------------


def _unknown_model(match: re.Match[str]) -> str:
    import timm

    import geofm.models  # noqa: F401 - registers the names

    return f"unknown model '{match[1]}'{did_you_mean(match[1], timm.list_models())}"


def _unknown_argument(match: re.Match[str]) -> str:
    found = [getattr(module, match[1], None) for module in list(sys.modules.values())]
    known = [name for cls in found if inspect.isclass(cls) for name in _parameters_of(cls)]
    return f"{match[1]} has no argument '{match[2]}'{did_you_mean(match[2], known)}"


def _unknown_encoder(match: re.Match[str]) -> str:
    known = re.findall(r"'([^']+)'", match[2])
    return f"unknown model '{match[1]}'{did_you_mean(match[1], known)}"


def _silent_rank(match: re.Match[str]) -> str:
    milliseconds = match[1] or match[3]
    within = f' within {int(milliseconds) / 1000:g} s' if milliseconds else ''
    within = f' within {match[2]} s' if match[2] else within
    return (
        f'another rank did not respond{within}: it hangs, or its node is down. Restart the run '
        'with --resume auto; the `timeout` of the strategy sets this time limit'
    )


#: Messages of PyTorch, timm and others that do not say what to do.
_EXPLANATIONS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r'^Unknown model \((.*)\)$', _unknown_model),
    (r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", _unknown_argument),
    (r"Wrong encoder name [`'](.+?)[`'], supported encoders: (.*)", _unknown_encoder),
    (
        r'Target (-?\d+) is out of bounds|Class values must be (?:smaller than|non-negative)'
        # torchmetrics' confusion matrix of labels beyond the number of classes.
        r"|shape '\[(\d+), \2\]' is invalid for input of size",
        lambda match: (
            'the data contain labels that are not classes of the model'
            + (f', e.g. {match[1]}' if match[1] else '')
            + (f', which has num_classes={match[2]}' if match[2] else '')
            + ": set the model's num_classes to one more than the largest label, and ignore_index "
            'to the value of pixels without a label'
        ),
    ),
    (
        r'Expected more than 1 value per channel when training',
        lambda match: (
            'batch normalization cannot be trained on a batch with one image: choose a '
            'batch_size of 2 or more that does not leave one image for the last batch'
        ),
    ),
    (
        # TorchGeo's data modules take 0 for a batch size that was not given.
        r'\.batch_size has length 0',
        lambda match: 'batch_size must be a positive number of samples, not 0',
    ),
    (
        r'^(.*) is not a valid WeightsEnum',
        lambda match: f"weights '{match[1]}': neither a file nor a name of weights in TorchGeo",
    ),
    (
        r'Weights only load failed',
        lambda match: (
            'a file of weights cannot be read: it is damaged, has another format, or contains '
            'Python objects other than tensors, which are not loaded from files'
        ),
    ),
    (r'(Wrong input shape .*)', lambda match: match[1]),
    (
        r'gloo/transport.* Timed out waiting (\d+)ms'
        r'|Timed out after (\d+) seconds waiting for clients'
        r'|client socket has timed out after (\d+)ms'
        r'|Watchdog caught collective operation timeout',
        _silent_rank,
    ),
    (
        r'gloo/transport|NCCL (?:error|communicator was aborted)|ncclRemoteError',
        lambda match: (
            'another rank has ended: see its own error message, unless it was killed. Restart the '
            'run with --resume auto'
        ),
    ),
    (
        r"^(?:CUDA )?out of memory|CUDA out of memory|DefaultCPUAllocator: can't allocate memory",
        lambda match: (
            'the device is out of memory: choose a smaller batch_size, image or window, or model'
        ),
    ),
    (
        r'Found no NVIDIA driver|Torch not compiled with \w+ enabled|No CUDA GPUs are available'
        r'|Expected one of (?:cpu, )[\w, ]+ device type at start of device string'
        r'|invalid device ordinal|Invalid device string',
        lambda match: 'there is no such device on this machine: leave device out to use the CPU',
    ),
)


# -- messages of jsonargparse ------------------------------------------------------------------

_KEY = re.compile(r'Parser key "(?P<key>[^"]*)"(?P<place>[^:]*):?\s*(?P<rest>.*)', re.DOTALL)
_CLASS = re.compile(r"Problem with given class_path '(?P<key>.*)':\s*(?P<rest>.*)")
_NOISE = (
    'Does not validate against any',
    'Subtypes:',
    'Errors:',
    'Given value type:',
    'Subclass types expect one of:',
    'a class path (str)',
    'a dict with',
)
_OPTION = (
    re.compile(r"Option '(?P<name>.*?)' is not accepted"),
    re.compile(r"(?:Subcommand|Group) '.*?' does not accept (?:option|nested key) '(?P<name>.*?)'"),
    re.compile(r"No action for key '?\"?(?P<name>[^'\"]*)"),
)
_MISSING_CLASS = re.compile(
    r"module '[\w.]*' has no attribute|No module named|Unexpected import path format"
)
_NO_PATH = re.compile(r'Expected a dot import path string: (?P<name>.*)')
_NO_CLASS = re.compile(r'Not a valid subclass of|Expected an instantiatable class')


def usage_message(error: ParserError, args: Sequence[str]) -> str:
    """Shorten an error message of jsonargparse.

    Args:
        error: The error.
        args: Arguments of the command.

    Returns:
        Usually one line: file and line number, the key, the error, and a similar name.
    """
    parser, message, configs = error.parser, str(error), _configs(args)
    if not message.startswith(('Parser key', 'Subcommand', 'Group', 'Option', 'No action')):
        return _other_message(parser, message, configs)
    leaves = list(_leaves(message))
    if not leaves:
        return _plain(message)
    deepest = max(len(path) for path, _ in leaves)
    path = next(path for path, _ in leaves if len(path) == deepest)
    texts = list(dict.fromkeys(text for found, text in leaves if found == path))
    key, last = '', None
    for kind, name in path:
        if kind == 'key':
            key = f'{key}.init_args.{name}' if last else '.'.join(filter(None, [key, name]))
        last = name if kind == 'class' else None
    given = re.findall(r'Given value: (.*)', message)
    text, token = _explain(parser, texts, last, given[-1] if given else '')
    token = token or key.rpartition('.')[2]
    where = '' if _is_option(args, token) else _place(configs, token, _keys(parser))
    return ': '.join(part for part in (where, key, text) if part)


def _leaves(message: str) -> Iterator[tuple[tuple[tuple[str, str], ...], str]]:
    """Yield each error of a nested message, with the keys and classes that lead to it."""
    path: list[tuple[str, str]] = []
    # Length of the path before the alternatives at each indentation.
    depths: dict[int, int] = {}
    in_value = False
    for line in message.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith('- '):
            depths = {k: v for k, v in depths.items() if k <= indent}
            del path[depths.setdefault(indent, len(path)) :]
            text = text[2:]
            in_value = False
        while text and not in_value:
            if text.startswith('Given value:'):
                # The value may span several lines.
                in_value = True
            elif text.startswith(_NOISE):
                break
            elif match := _KEY.match(text):
                path.append(('key', match['key'] + match['place'].strip()))
                text = match['rest']
                continue
            elif match := _CLASS.match(text):
                path.append(('class', match['key']))
                text = match['rest']
                continue
            else:
                yield tuple(path), text
            break


def _explain(
    parser: ArgumentParser, texts: Sequence[str], class_path: str | None, given: str
) -> tuple[str, str | None]:
    """Return a readable message, and the name to look for in the configuration."""
    for text in texts:
        for pattern in _OPTION:
            if match := pattern.search(text):
                name = match['name']
                known = _keys(parser) if class_path is None else _parameters(class_path)
                of = '' if class_path is None else f' of {class_path}'
                similar = _similar_key(name, known)
                if not similar and class_path is not None and _passes_on(class_path):
                    similar = f'; its further arguments are given as dict_kwargs.{name}'
                return f"no option '{name}'{of}{similar}", name
        if match := _NO_PATH.search(text):
            return f"no class '{match['name']}'{_similar_class(match['name'])}", match['name']
        if _NO_CLASS.search(text):
            return 'expected the keys class_path and init_args, and no others', None
    if class_path is None:
        return _expected(texts, given), None
    if any(_MISSING_CLASS.search(text) for text in texts):
        return f"no class '{class_path}'{_similar_class(class_path)}", class_path
    return f'{class_path}: {_expected(texts, given)}', class_path


def _expected(texts: Sequence[str], given: str) -> str:
    """Combine several messages 'Expected a <class 'int'>. Got value: x' in one sentence."""
    kinds = []
    for text in texts:
        match = re.fullmatch(r'Expected an? (.*?)(?:\. Got value: (.*))?', text)
        if match is None:
            others = [t for t in texts if not t.startswith('Expected a <class')] or texts
            return '; '.join(_plain(t) for t in others[:3])
        kinds.append(_plain(match[1]))
        given = match[2] or given
    wanted = ' or '.join(dict.fromkeys(kinds))
    choices = [name for kind in kinds for name in re.findall(r"'([^']*)'", kind)]
    # Do not repeat whole configurations.
    got = f', not {given!r}' if 0 < len(given) <= 80 else ''
    return f'expected {wanted}{got}{did_you_mean(given, choices)}'


def _plain(text: str) -> str:
    text = re.sub(r"<class '([\w.]*)'>", lambda m: m[1].rpartition('.')[2], text)
    text = re.sub(r'(?:typing\.)?Literal\[(.*?)\]', r'one of \1', text)
    return text.replace('NoneType', 'null')


def _other_message(parser: ArgumentParser, message: str, configs: Sequence[Path]) -> str:
    """Shorten messages that are not about a single key."""
    if match := re.match(r'unrecognized arguments: *(\S[^\s=]*)', message):
        name = match[1]
        bare = name.lstrip('-')
        return f"no option '{name}'{_similar_key(bare, _keys(parser), '--')}"
    if match := re.match(r'the following arguments are required: (.*)', message):
        return f'missing: {", ".join(_as_given(parser, key) for key in match[1].split(", "))}'
    if message.startswith('Problems parsing config'):
        reason = ' '.join(message.partition(': ')[2].split())
        broken = next((file for file in configs if not _is_yaml(file)), None)
        if broken is not None:
            reason = re.sub(r'in "<(?:unicode|byte) string>", ', 'in ', reason)
            return f'{broken}: not valid YAML: {reason}'
        return f'not valid YAML: {reason}'
    if message.startswith('Unexpected config'):
        empty = next((file for file in configs if not _is_mapping(file)), None)
        return f'{empty or "config"}: expected keys and values, e.g. "model: ..."'
    return _plain(message)


def _as_given(parser: ArgumentParser, key: str) -> str:
    """Return an argument as it is given: ``--option``, or ``NAME`` for one given by position."""
    action = next((action for action in parser._actions if action.dest == key), None)
    if action is None:
        return key
    return action.option_strings[0] if action.option_strings else key.upper()


def _similar_key(name: str, known: Sequence[str], prefix: str = '') -> str:
    """Suggest a similar key, or a similar first part of a nested key."""
    found = did_you_mean(name, [key for key in known if key.count('.') == name.count('.')])
    if not found and '.' in name:
        head = name.partition('.')[0]
        heads = {key.partition('.')[0] for key in known}
        found = '' if head in heads else did_you_mean(head, heads)
    found = found or did_you_mean(name, known)
    return found.replace("mean '", f"mean '{prefix}")


def _similar_class(class_path: str) -> str:
    """Suggest a class for a class path or short name that does not exist."""
    module, _, name = class_path.rpartition('.')
    paths = [f'{module}.{n}' for n in _public_names(module)] if module else []
    classes = {cls.__name__: cls for cls in _classes()}
    if not module:
        return did_you_mean(name, classes)
    if found := did_you_mean(class_path, paths):
        return found
    close = did_you_mean(name, classes)
    match = re.search(r"'(.*)'", close)
    return f"; did you mean '{_shortest_path(classes[match[1]])}'?" if match else ''


def _public_names(module: str) -> list[str]:
    try:
        return [name for name in dir(import_module(module)) if name[0].isupper()]
    except Exception:
        return []


def _classes() -> Iterator[type]:
    """Yield the callbacks, data modules and tasks that a configuration may name."""
    from lightning.pytorch import Callback
    from torchgeo.datamodules import BaseDataModule
    from torchgeo.tasks import BaseTask

    waiting: list[type] = [Callback, BaseDataModule, BaseTask]
    while waiting:
        found = waiting.pop()
        yield found
        waiting.extend(found.__subclasses__())


def _shortest_path(cls: type) -> str:
    """Return the import path of a class from the outermost package that exports it."""
    parts = cls.__module__.split('.')
    for end in range(1, len(parts) + 1):
        module = sys.modules.get('.'.join(parts[:end]))
        if getattr(module, cls.__name__, None) is cls:
            return '.'.join([*parts[:end], cls.__name__])
    return f'{cls.__module__}.{cls.__name__}'


def _parameters(class_path: str) -> list[str]:
    """Return the parameters of a class and its bases, to which it may pass further arguments."""
    cls = _class_of(class_path)
    return [] if cls is None else _parameters_of(cls)


def _passes_on(class_path: str) -> bool:
    """Return whether a class takes any argument, e.g. to pass it on to a data set."""
    cls: Any = _class_of(class_path)
    with suppress(TypeError, ValueError):
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
    return False


def _class_of(class_path: str) -> type | None:
    module, _, name = class_path.rpartition('.')
    try:
        cls: Any = getattr(import_module(module), name) if module else None
    except Exception:
        return None
    cls = cls or next((c for c in _classes() if c.__name__ == name), None)
    return cls if inspect.isclass(cls) else None


def _parameters_of(cls: type) -> list[str]:
    names: list[str] = []
    for base in cls.__mro__:
        # Classes implemented in C may have no signature.
        with suppress(TypeError, ValueError):
            if base is not object and '__init__' in vars(base):
                names += inspect.signature(base).parameters
    return [name for name in dict.fromkeys(names) if name not in ('args', 'kwargs')]


def _keys(parser: ArgumentParser) -> list[str]:
    """Return the keys of a parser and its subcommands."""
    keys = [action.dest for action in parser._actions]
    for action in parser._actions:
        for name, sub in (getattr(action, '_name_parser_map', None) or {}).items():
            if getattr(parser, 'subcommand', name) == name:
                keys += _keys(sub)
    return [key for key in dict.fromkeys(keys) if key not in ('help', '==SUPPRESS==')]


def _configs(args: Sequence[str]) -> list[Path]:
    """Return the configuration files among the arguments."""
    paths = [Path(value) for _, value in option_values(args, ('-c', '--config'))]
    return [path for path in paths if path.is_file()]


def option_values(args: Sequence[str], options: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Find the values of options in arguments.

    Args:
        args: The arguments: ``--option value`` or ``--option=value``.
        options: The options to look for.

    Yields:
        Each option found and its value.
    """
    for i, arg in enumerate(args):
        option, equals, value = arg.partition('=')
        if option in options:
            yield option, value if equals else ''.join(args[i + 1 : i + 2])


def _load(file: Path) -> Any:
    import yaml

    return yaml.safe_load(file.read_text(encoding='utf-8'))


def _is_yaml(file: Path) -> bool:
    try:
        _load(file)
    except Exception:
        return False
    return True


def _is_mapping(file: Path) -> bool:
    return _is_yaml(file) and isinstance(_load(file), dict)


def _is_option(args: Sequence[str], token: str) -> bool:
    """Return whether a key or class was given as an argument, and not in a file."""
    options = [arg.partition('=') for arg in args]
    return any((o.startswith('--') and o.endswith(token)) or v == token for o, _, v in options)


def _place(configs: Sequence[Path], token: str, known: Sequence[str]) -> str:
    """Return the file and line that contain a key or class; empty unless it is only one line."""
    names = [token]
    if '/' not in token:
        parts = {part for key in known for part in key.split('.')}
        names += [part for part in token.split('.') if part not in parts] or token.split('.')[-1:]
    for name in names:
        pattern = re.compile(rf'(?<![\w.]){re.escape(name)}(?![\w.])')
        found = [
            f'{file}, line {number}'
            for file in configs
            for number, line in enumerate(file.read_text(errors='replace').splitlines(), 1)
            if pattern.search(line.partition('#')[0])
        ]
        if name and len(found) == 1:
            return found[0]
    return ''
