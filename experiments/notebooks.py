"""Run the notebooks of the documentation and store their outputs.

    pip install --constraint .ci/constraints.txt --group notebooks
    python experiments/notebooks.py [pretrain few_labels ...]

runs notebooks of `docs/notebooks` in a temporary folder and writes them back. Progress bars and
colours of the terminal are left out of the outputs.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from geofm.atomic import atomic_file

NOTEBOOKS = Path(__file__).parents[1] / 'docs' / 'notebooks'

#: Control sequences of a terminal.
_CONTROL = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')


def plain(text: str) -> str:
    """Return the output of commands as a reader sees it at the end, without progress bars."""
    lines = _CONTROL.sub('', text).replace('\r\n', '\n').split('\n')
    shown = (line.rpartition('\r')[2].rstrip() for line in lines)
    return '\n'.join(line for line in shown if '━' not in line)


def cleaned(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the pieces of each stream, and leave out what is not text."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output['output_type'] == 'stream' and last.get('name') == output['name']:
            last['text'] += ''.join(output['text'])
        elif output['output_type'] == 'stream':
            joined.append({**output, 'text': ''.join(output['text'])})
        else:
            joined.append(output)
    for output in joined:
        if output['output_type'] == 'stream':
            output['text'] = plain(output['text']).splitlines(keepends=True)
    return [output for output in joined if output.get('text', True)]


def execute(path: Path) -> dict[str, Any]:
    """Run a notebook in an empty folder and return it with its outputs."""
    # Commands of the notebook are those of this environment.
    environment = {**os.environ, 'COLUMNS': '80'}
    # Of tqdm, which misses widgets.
    environment['PYTHONWARNINGS'] = 'ignore:IProgress not found'
    environment['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    command = [sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', path.name]
    command += ['--ExecutePreprocessor.record_timing=False', '--output', 'executed']
    with tempfile.TemporaryDirectory() as folder:
        # The folder of a notebook is its working directory.
        shutil.copy(path, folder)
        subprocess.run(command, cwd=folder, env=environment, check=True)
        text = (Path(folder) / 'executed.ipynb').read_text(encoding='utf-8')
        if named := [place for place in (folder, sys.prefix, sys.base_prefix) if place in text]:
            raise ValueError(f'{path.name}: an output names {named[0]}')
    return dict(json.loads(text))


def main() -> None:
    """Run the named notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'names', nargs='*', default=sorted(p.stem for p in NOTEBOOKS.glob('*.ipynb'))
    )
    for name in parser.parse_args().names:
        path = NOTEBOOKS / f'{name}.ipynb'
        # What Jupyter adds about this machine's Python is left out.
        kept = json.loads(path.read_text(encoding='utf-8'))['metadata']
        notebook = {**execute(path), 'metadata': kept}
        for cell in notebook['cells']:
            if cell['cell_type'] == 'code':
                cell['outputs'] = cleaned(cell['outputs'])
        with atomic_file(path) as part:
            part.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', 'utf-8')


if __name__ == '__main__':
    main()
