"""Generate pages of the documentation site from the rest of the repository.

MkDocs calls the functions named ``on_...``; griffe, which reads the docstrings, calls
:class:`Docstrings`.
"""

import ast
import io
import json
import os
import re
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

#: Packages whose ``__all__`` is the public API.
PACKAGES = (
    *('callbacks', 'datamodules', 'datasets', 'deploy', 'evaluation', 'losses', 'maps', 'models'),
    *('models.fusion', 'sensors', 'tasks', 'transforms'),
)

#: Modules of which these names are public.
MODULES = {
    'checkpoint_io': ('AtomicCheckpointIO',),
    'datasets.labels': ('read_labels', 'read_points'),
    'grid': ('Grid',),
    'strategies': ('FullyShardedStrategy',),
}

#: Pages that are files at the root of the repository.
ROOT_PAGES = {
    'contributing.md': 'CONTRIBUTING.md',
    'changelog.md': 'CHANGELOG.md',
    'security.md': 'SECURITY.md',
    'code_of_conduct.md': 'CODE_OF_CONDUCT.md',
}


class Docstrings(Extension):
    """Griffe extension that turns reStructuredText, such as ``:class:`Name```, into Markdown.

    It also removes the first line of constructors, whose docstrings are part of their class.
    """

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of an object.

        Args:
            obj: The object.
            **kwargs: Further arguments of griffe, ignored.
        """
        if obj.docstring is not None:
            text = re.sub(r'^Initialize a new \w+ instance\.\s*', '', obj.docstring.value)
            obj.docstring.value = _markdown(text)


def _markdown(text: str) -> str:
    """Convert the reStructuredText that docstrings contain: roles, links and literal blocks."""
    text = re.sub(r':\w+:`~?([^`]+)`', r'`\1`', text)
    text = re.sub(r'`([^`<]+?)\s+<(https?://[^>]+)>`__?', r'[\1](\2)', text)
    text = re.sub(r'\.\. seealso:: (.+)', r'See also \1.', text)
    return re.sub(r'::$', ':', text, flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages.

    Args:
        files: Files of the folder docs.
        config: The configuration.

    Returns:
        All files.
    """
    pages = {page: _of_root(source) for page, source in ROOT_PAGES.items()}
    pages['quickstart.md'] = _quick_start()
    pages['results.md'] = _results()
    pages['reference/cli.md'] = _command_line()
    pages['reference/configs.md'] = _configurations()
    for package in PACKAGES:
        names = import_module(f'geofm.{package}').__all__
        pages[f'reference/{package}.md'] = _api(f'geofm.{package}', names)
    for module, names in MODULES.items():
        pages[f'reference/{module}.md'] = _api(f'geofm.{module}', names)
    for path in (ROOT / 'docs' / 'notebooks').glob('*.ipynb'):
        pages[f'notebooks/{path.stem}.md'] = _notebook(path)
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Redirect links to files outside of docs to the generated pages.

    Args:
        markdown: Text of a page.
        page: The page.
        config: The configuration.
        files: All pages.

    Returns:
        The text to render.
    """

    def link(match: re.Match[str]) -> str:
        exists = (ROOT / 'experiments' / 'results' / f'{match[1]}.md').exists()
        return f'](results.md#{match[1]})' if exists else '](results.md)'

    markdown = markdown.replace('](../README.md#quick-start)', '](quickstart.md)')
    for name, source in ROOT_PAGES.items():
        markdown = markdown.replace(f'](../{source}', f']({name}')
    return re.sub(r'\]\(\.\./experiments/results/(\w+)\.md\)', link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the text of a page fit narrow screens.

    Options and numbers with a unit are kept on one line. A picture is a link to its file, which can
    be enlarged.

    Args:
        html: Content of a page.
        page: The page.
        config: The configuration.
        files: All pages.

    Returns:
        The content to show.
    """
    parts = re.split(r'(?s)(<pre.*?</pre>)', html)
    for i, part in enumerate(parts[::2]):
        part = re.sub(r'(?<=[>\s])--[\w.-]+', r'<span class="whole">\g<0></span>', part)
        part = re.sub(r'(?<=\d) (?=%)', '\N{NO-BREAK SPACE}', part)
        parts[2 * i] = re.sub(
            r'<img [^>]*src="([^":]+)"[^>]*>', r'<a href="\1" title="Enlarge">\g<0></a>', part
        )
    return ''.join(parts)


def _of_root(name: str) -> str:
    """Return a page at the root of the repository, with links relative to the folder docs."""
    text = (ROOT / name).read_text(encoding='utf-8').replace('](docs/', '](')
    for page, source in ROOT_PAGES.items():
        text = text.replace(f']({source})', f']({page})')
    return text


def _quick_start() -> str:
    """Return the sections of README from the quick start up to the list of pages."""
    text = _of_root('README.md')
    return text[text.index('## Quick start') + 1 : text.index('## Documentation')]


def _results() -> str:
    """Return all tables of results with the scripts that wrote them."""
    parts = [
        '# Results',
        'The tables of `experiments/results` and the scripts that wrote them. The how-to guides '
        'explain them.',
    ]
    for path in sorted((ROOT / 'experiments' / 'results').glob('*.md')):
        # An excerpt of another table, for a how-to guide.
        if path.stem.endswith('_brief'):
            continue
        text = path.read_text(encoding='utf-8')
        parts.append(f'## `{path.stem}` {{ #{path.stem} }}')
        scripts = (f'experiments/{path.stem}.py', f'experiments/benchmarks/{path.stem}.py')
        parts += [
            f'`python {script}`: {_first_line(ROOT / script)}'
            for script in scripts
            if (ROOT / script).exists()
        ]
        parts.append(re.sub(r'^#+ (.*)$', r'**\1**', text, flags=re.MULTILINE))
    return '\n\n'.join(parts)


def _first_line(script: Path) -> str:
    """Return the first line of the docstring of a script."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding='utf-8'))) or ''
    return docstring.partition('\n')[0]


def _notebook(path: Path) -> str:
    """Return the text, code and outputs of a notebook as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source.replace('.ipynb)', '.md)'))
            continue
        parts.append(f'```python\n{source}\n```')
        for output in cell['outputs']:
            data = {kind: ''.join(value) for kind, value in output.get('data', {}).items()}
            if 'image/jpeg' in data:
                parts.append(f'![](data:image/jpeg;base64,{"".join(data["image/jpeg"].split())})')
            elif 'text/html' in data:
                # The theme styles tables without a class.
                table = re.sub(r'(?s)<style.*?</style>', '', data['text/html'])
                table = re.sub(r'<table[^>]*>', '<table>', table)
                parts.append(re.sub(r'\n\s*', '\n', table))
            else:
                text = ''.join(output.get('text', '')) or data['text/plain']
                parts.append(f'```text\n{text.rstrip()}\n```')
    parts.append(f'Download: [{path.name}]({path.name})')
    return '\n\n'.join(parts)


def _command_line() -> str:
    """Return the help texts of all commands."""
    from geofm.cli import COMMANDS, LIGHTNING_COMMANDS, main

    def output(*args: str) -> str:
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            main(args)
        # The help of jsonargparse contains a control character.
        shown = re.sub(r'[^\n -~]', '', text.getvalue()).strip()
        return f'```text\n{shown}\n```'

    os.environ['COLUMNS'] = '84'
    parts = ['# Command line', output('--help')]
    for name in COMMANDS:
        parts += [f'## geofm {name}', output(name, '--help')]
    others = ', '.join(f'`geofm {name}`' for name in LIGHTNING_COMMANDS if name != 'fit')
    parts += ['## geofm fit', f'{others} take the same options, except `--resume`.']
    parts.append(output('fit', '--help'))
    return '\n\n'.join(parts)


def _configurations() -> str:
    """Return the shipped configurations as collapsed blocks."""
    from geofm.commands.configs import description, shipped_names

    parts = [
        '# Configurations',
        '`geofm configs` lists these files, and `geofm configs --copy FOLDER` copies them. '
        '`--config`, `--layout` and `--sensors` take their names.',
    ]
    folder = ''
    for name, path in shipped_names().items():
        if folder != (folder := name.split('/')[0]):
            parts.append(f'## {folder}')
        lines = path.read_text(encoding='utf-8').rstrip().splitlines()
        title = description(path).replace('"', "'")
        code = ['```yaml', *lines, '```']
        block = '\n'.join(f'    {line}'.rstrip() for line in code)
        parts.append(f'??? abstract "`{name}`{": " if title else ""}{title}"\n{block}')
    return '\n\n'.join(parts)


def _api(package: str, names: Iterable[str]) -> str:
    """Return the reference page of the public names of a package or module."""
    summary = _markdown(import_module(package).__doc__ or '')
    directives = (f'::: {package}.{name}' for name in sorted(names, key=str.lower))
    return '\n\n'.join([f'# {package}', summary, *directives])
