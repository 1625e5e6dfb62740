"""The experiment on fusion: its skies, its table and its figure, on made-up scores."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from geofm.datasets import SampleLandCover, write_sample_data
from geofm.sensors import SENSORS

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    names = ('fusion', 'runs', 'skies', 'tables')
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = __import__('fusion')
    for name in names:
        # Not left behind under so common a name.
        monkeypatch.delitem(sys.modules, name)
    return module


@pytest.fixture(scope='module')
def data(module_path: Path) -> Path:
    root = module_path / 'sample'
    rois = [('ROIs1868', 119), ('ROIs1970', 132)]
    write_sample_data(root, rois, patches_per_roi=2, time_steps=4, size=128, seed=3)
    return root


ABOUT = {
    'clear': {'windows': 400, 'places': 150},
    'partly': {'windows': 100, 'places': 80},
    'overcast': {'windows': 50, 'places': 45},
}


def made_up(fusion: Any, seeds: int = 1) -> Any:
    """Scores of which no two are alike."""
    draw = np.random.default_rng(0).random

    def scores(measures: tuple[str, ...]) -> dict[str, dict[str, float]]:
        return {sky: {measure: draw() for measure in measures} for sky in fusion.SKIES}

    def rows(names: list[str], measures: tuple[str, ...], seeds: int) -> Any:
        return {name: [scores(measures) for _ in range(seeds)] for name in names}

    every = list(fusion.BACKBONES)
    fused = [f'{name}, {less}' for name in every[:4] for less in fusion.WITHHELD]
    return {
        fusion.PRETRAINED: rows(every, fusion.MEASURES, seeds),
        fusion.WITHOUT: rows(fused, fusion.MEASURES, seeds),
        fusion.RANDOM: rows(every, fusion.MEASURES, seeds),
        fusion.WORDS: rows(list(fusion.SENSOR_BANDS), fusion.MEASURES[1:], seeds),
        fusion.STATISTICS: rows(list(fusion.SENSOR_BANDS), fusion.MEASURES[1:], 1),
    }


def test_clouds_drawn_again_are_those_of_the_data(fusion: Any, data: Path) -> None:
    dataset = SampleLandCover(data, 'test', window=64, min_purity=0)
    shares = fusion.hidden_shares(data, dataset)
    assert len(shares) == len(dataset) == 2 * 2 * 4 * 4
    # The mean over the windows of a patch is what the table of scenes says of it.
    pairs = pd.DataFrame(fusion.pairs_of(dataset), columns=['season', 'roi', 'patch', 'time_step'])
    means = pairs.assign(share=shares).groupby(list(pairs.columns)).share.mean()
    known = pd.read_csv(data / 'scenes.csv').set_index(list(pairs.columns)).cloud_cover
    np.testing.assert_allclose(means, known[means.index], atol=1e-4)
    # And where it is brighter, more of it is hidden.
    bright = [float(dataset[i]['image'][2:6].mean()) for i in range(len(dataset))]
    assert np.corrcoef(bright, shares)[0, 1] > 0.8


def test_clouds_of_other_data_are_refused(fusion: Any, data: Path, tmp_path: Path) -> None:
    dataset = SampleLandCover(data, 'test', min_purity=0)
    made = json.loads((data / 'sample.json').read_text())
    (tmp_path / 'sample.json').write_text(json.dumps({**made, 'seed': 4}))
    (tmp_path / 'scenes.csv').write_text((data / 'scenes.csv').read_text())
    with pytest.raises(ValueError, match='write the data again'):
        fusion.hidden_shares(tmp_path, dataset)


def test_every_window_is_under_one_sky(fusion: Any) -> None:
    shares = np.array([0.0, 0.049, 0.05, 0.59, 0.6, 1.0])
    chosen = np.stack(list(fusion.skies(shares).values()))
    assert chosen.argmax(axis=0).tolist() == [0, 0, 1, 1, 2, 2]
    assert (chosen.sum(axis=0) == 1).all()
    hits = {'CLS, 5-NN': torch.tensor([True, False, True, True, False, False])}
    assert fusion.by_sky(hits, shares) == {
        'clear': {'CLS, 5-NN': 0.5}, 'partly': {'CLS, 5-NN': 1.0}, 'overcast': {'CLS, 5-NN': 0.0}
    }  # fmt: skip


def test_what_tells_classes_apart_is_found(fusion: Any) -> None:
    labels = torch.arange(40) % 4
    told = torch.nn.functional.one_hot(labels, 4) + 0.01 * torch.randn(40, 4)
    bank = {'CLS': torch.randn(40, 4), 'patches': told}
    found = fusion.predictions(bank, labels, bank)
    assert tuple(found) == fusion.MEASURES
    assert torch.equal(found['patches, 5-NN'], labels)
    assert torch.equal(found['logistic regression'], labels)


@pytest.mark.parametrize('seeds', [1, 2])
def test_the_table_has_every_row_and_its_floors(fusion: Any, seeds: int) -> None:
    found = made_up(fusion, seeds)
    head, line, *rows = fusion.markdown(found).splitlines()
    assert head.count('|') == line.count('|') == 2 + 9
    assert len(rows) == 6 + 8 + 6 + 3 + 3
    cells = {row.split('|')[1].strip(): [c.strip() for c in row.split('|')[2:-1]] for row in rows}
    for kind, named in found.items():
        for name, each in named.items():
            of_row = iter(cells[f'{kind}: {name}'])
            for measure in fusion.MEASURES:
                for sky in fusion.SKIES:
                    shown = next(of_row)
                    if measure not in each[0][sky]:
                        assert shown == '–'
                        assert kind in (fusion.WORDS, fusion.STATISTICS)
                        continue
                    values = [100 * scores[sky][measure] for scores in each]
                    assert float(shown.split()[0]) == pytest.approx(np.mean(values), abs=0.051)
                    assert ('(' in shown) == (len(each) == 2)


def test_gains_compare_with_the_better_sensor_and_with_the_given_one(fusion: Any) -> None:
    shares = np.array([0.0] * 6 + [0.3] * 3 + [0.9] * 3)
    places = np.arange(12)

    def row(hits: str) -> list[dict[str, torch.Tensor]]:
        hit = torch.tensor([c == '1' for c in hits])
        return [dict.fromkeys(fusion.MEASURES, hit)]

    found = {
        fusion.PRETRAINED: {
            'S1 + S2, linear': row('111111' '110' '000'),
            'S2': row('111000' '100' '000'),
            'S1': row('110000' '110' '111'),
        },
        fusion.WITHOUT: {'S1 + S2, linear, without S1': row('100000' '111' '000')},
    }  # fmt: skip
    gains = fusion.gains(found, shares, places)
    both, alone = gains['S1 + S2, linear'], gains['S1 + S2, linear, without S1']
    for sky, gain in {'clear': 3 / 6, 'partly': 0.0, 'overcast': -1.0}.items():
        assert both[sky]['CLS, 5-NN'][0] == pytest.approx(gain)
    for sky, gain in {'clear': -2 / 6, 'partly': 2 / 3, 'overcast': 0.0}.items():
        assert alone[sky]['CLS, 5-NN'][0] == pytest.approx(gain)
    # Of independent windows, the error is that of a mean; of one place seen twice, it is larger.
    differences = np.array([1.0, -1.0, 0.0, 0.0, 1.0, 0.0])
    expected = 2 * differences.std() / 6**0.5
    assert fusion.clustered_error(differences, np.arange(6)) == pytest.approx(expected)
    twice = np.repeat(differences, 2)
    assert fusion.clustered_error(twice, np.repeat(np.arange(6), 2)) == pytest.approx(expected)
    text = fusion.gains_markdown(gains)
    assert '| **-100.0 ± 0.0** |' in text
    assert '+50.0 ± ' in text


def test_the_caption_says_how_far_off_figures_may_be(fusion: Any) -> None:
    text = fusion.caption(ABOUT, [0], 'bf16-mixed')
    assert 'precision bf16-mixed' in text
    assert '400 windows of 150 places, two standard errors are up to 5 points' in text
    assert '100 windows of 80 places, two standard errors are up to 10 points' in text


def test_the_figure_shows_bars_over_their_floors(fusion: Any) -> None:
    found = made_up(fusion)
    figure = fusion.draw(found, ABOUT)
    assert [ax.get_title() for ax in figure.axes] == list(fusion.PICTURED)
    for ax, measure in zip(figure.axes, fusion.PICTURED, strict=True):
        heights = [bar.get_height() for bar in ax.patches]
        expected = [
            100 * rows[0][sky][measure]
            for sky in fusion.SKIES
            for rows in found[fusion.PRETRAINED].values()
        ]
        np.testing.assert_allclose(heights, expected)
        lines = {
            style: [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == style]
            for style in ('--', ':')
        }
        floors = [
            100 * rows[0][sky][measure]
            for sky in fusion.SKIES
            for rows in found[fusion.RANDOM].values()
        ]
        np.testing.assert_allclose(lines['--'], floors)
        assert len(lines[':']) == 6


@pytest.mark.parametrize('variant', ['early', 's1'])
def test_a_row_is_the_quickstart_with_another_model(fusion: Any, variant: str) -> None:
    given = fusion.arguments(variant, Path('tree'), 'bf16-mixed')
    assert f'--model.init_args.model=geofm_vit_nano_patch16_{variant}' in given
    assert '--trainer.precision=bf16-mixed' in given
    # One sensor cannot be dropped.
    assert any('sensor_dropout' in word for word in given) == (variant not in SENSORS)
    bands = [word.split('=', 1)[1] for word in given if 'bands=' in word]
    assert [tuple(json.loads(b)) for b in bands] == (
        [SENSORS[variant].band_names] if variant in SENSORS else []
    )
