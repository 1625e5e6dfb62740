"""The notebooks of docs/notebooks: their code on small data, and their stored outputs."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from geofm.sample import DEFAULT_ROIS
from tests.docs_commands import ROOT, run

NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))

#: The shipped configurations by name, as tests/docs_commands.py knows them.
NAMED = re.compile(r'--config (?=pretrain/|finetune/)')


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    cells = json.loads(path.read_text())['cells']
    return [cell for cell in cells if cell['cell_type'] == 'code']


def run_cell(source: str, names: dict[str, Any]) -> None:
    """Run a cell without Jupyter: commands of geofm in this process, and without magics."""
    if source.startswith('%%writefile '):
        first, _, content = source.partition('\n')
        Path(first.split()[1]).write_text(content)
        return
    for part in re.split(r'^([!%].*)$', source, flags=re.MULTILINE):
        if part.startswith('!'):
            command = NAMED.sub('--config configs/', re.sub(r' > \S+ 2>&1$', '', part[1:]))
            # The few steps of a test are logged, too.
            command += ' --trainer.log_every_n_steps=1' if command.startswith('geofm fit') else ''
            run(command, DEFAULT_ROIS[:6])
        elif not part.startswith('%'):
            exec(compile(part, 'cell', 'exec'), names)


# One test: the notebooks share their data, which are written once.
def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(NOTEBOOKS) == 3
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    plt.switch_backend('agg')
    for path in NOTEBOOKS:
        names: dict[str, Any] = {}
        for cell in code_cells(path):
            run_cell(''.join(cell['source']), names)
        plt.close('all')
    assert json.loads(Path('maps/classify.json').read_text())['accuracy']
    assert list(Path('predicted').glob('*/*_classes.tif'))
    assert Path('maps/s2_pca.tif').exists()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_small_and_whole(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 200_000
    assert not re.search(r'/(home|root|tmp|usr)/|site-packages', text)
    # Neither progress bars nor control sequences.
    assert not re.search(r'━|\x1b|\\u001b|\\r', text)
    outputs = [output for cell in code_cells(path) for output in cell['outputs']]
    assert all(output['output_type'] != 'error' for output in outputs)
    assert any('image/jpeg' in output.get('data', {}) for output in outputs)


def test_stored_outputs_are_what_a_reader_of_the_terminal_sees() -> None:
    script = runpy.run_path(str(ROOT / 'experiments' / 'notebooks.py'))
    stream = {'output_type': 'stream', 'name': 'stdout'}
    bar = '\r\x1b[2KScenes \x1b[91m━━━\x1b[0m  50%\r\x1b[2KScenes ━━━ 100%\r\n'
    result = {'output_type': 'execute_result', 'data': {'text/plain': '3'}}
    outputs = [
        {**stream, 'text': '\x1b[?25l'},
        {**stream, 'text': [bar, '\x1b[?25hdata/']},
        {**stream, 'text': 'scenes\r\n ───\r\n'},
        result,
    ]
    assert script['cleaned'](outputs) == [
        {**stream, 'text': ['data/scenes\n', ' ───\n']},
        result,
    ]
    # Output of a progress bar alone is left out.
    assert script['cleaned']([{**stream, 'text': bar}]) == []
