import warnings
from pathlib import Path

import pytest

from geofm.cli import main
from geofm.printing import counted, printable

EVIL = '\x1b[31mred\x1b]0;title\x07 [/b] [bold]x[/] \u202egnp \x9b2J'


def test_characters_without_a_glyph_are_escaped() -> None:
    assert printable('Größe 5 µm, 7\xa0° – 文件 [/b]') == 'Größe 5 µm, 7\xa0° – 文件 [/b]'
    assert printable('a\x1b[2J\nb') == r'a\x1b[2J\nb'
    assert printable('a\nb', keep='\n') == 'a\nb'
    assert printable('\udcff\u2028\u202e') == r'\udcff\u2028\u202e'


def test_a_noun_agrees_with_its_number() -> None:
    assert [counted(n, 'file') for n in (0, 1, 2, 2000)] == [
        '0 files',
        '1 file',
        '2 files',
        '2,000 files',
    ]
    assert counted(1, 'patch', 'patches') == '1 patch'
    assert counted(3, 'patch', 'patches') == '3 patches'


def test_file_names_with_escape_sequences_are_escaped_by_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / 'data'
    (root / 'a [').mkdir(parents=True)
    (root / 'a [' / 'b].tif').write_bytes(b'not a raster')
    (root / f'{EVIL.replace("/", "")}.tif').touch()
    (root / '[').mkdir()
    (root / '[' / 'b].tif').touch()
    with pytest.raises(SystemExit):
        # None of the files can be used.
        main(['index', str(root)])
    out = capsys.readouterr().out
    assert '3 files' in out
    assert not set(out) & {'\x1b', '\x07', '\x9b', '\u202e'}


def test_warnings_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    main(['--version'])
    text = warnings.formatwarning(f'{EVIL}: left out', UserWarning, 'file.py', 1, 'source')
    assert text.startswith('file.py:1: UserWarning: \\x1b[31mred')
    assert not set(text) & {'\x1b', '\x07', '\x9b', '\u202e'}
