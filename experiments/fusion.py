"""Compare fused backbones with those of one sensor, under clear and cloudy skies.

Each row is `quickstart.yaml` with another model, pretrained from the same seed on the same pairs
for the same number of steps, and evaluated by land cover of windows of ROIs that were not used for
training, grouped by the fraction that clouds hide from Sentinel-2. Each place is seen under several
skies. Models of both sensors are pretrained with sensor dropout.

    geofm sample-data data/sample
    python experiments/fusion.py [--seeds 0 1] [--precision bf16-mixed]

writes `experiments/results/fusion.json` and `fusion.md` and `docs/images/fusion.png`, and fills the
tables of docs. Finished runs are not repeated. `--only-picture` draws the results again.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tables
import torch
from benchmarks.rounds import RESULTS, write_results, write_text
from matplotlib.figure import Figure
from rich.progress import track
from runs import (
    DATA,
    NEIGHBOURS,
    QUICKSTART,
    TASK,
    patch_words,
    pooled_features,
    pretrain,
    token_features,
)
from skies import SKIES, hidden_shares, pairs_of, skies
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from geofm.atomic import atomic_file
from geofm.datasets import SampleLandCover
from geofm.evaluation import knn_predict
from geofm.evaluation.backbones import Encoder, StatisticsEncoder
from geofm.models import MultiSensorViT, create_backbone, load_backbone, read_hparams
from geofm.sensors import BANDS, SENSORS

FIGURE = Path(__file__).parents[1] / 'docs' / 'images' / 'fusion.png'
EPOCHS = 240

#: Probability that a fused backbone sees one sensor only in a crop of pretraining.
SENSOR_DROPOUT = 0.5

#: Backbones by the last part of their names.
BACKBONES = {
    'S1 + S2, linear': 'linear',
    'S1 + S2, cross-attention': 'xattn',
    'S1 + S2, early': 'early',
    'S1 + S2, joint': 'joint',
    'S2': 's2',
    'S1': 's1',
}
#: Which of S1 and S2 a fused model is given.
WITHHELD = {'without S1': (False, True), 'without S2': (True, False)}

#: Bands of each set of sensors, for the baselines.
SENSOR_BANDS = {'S1 + S2': BANDS, 'S2': SENSORS['s2'].band_names, 'S1': SENSORS['s1'].band_names}

#: Features and probes.
MEASURES = ('CLS, 5-NN', 'patches, 5-NN', 'logistic regression')
#: Measures of the brief table and of the figure.
PICTURED = MEASURES[1:]

#: Whether the class of each window is predicted, by measure.
type Hits = dict[str, Tensor]
#: Accuracy by sky and measure.
type Scores = dict[str, dict[str, float]]
#: Hits or scores by kind of row and row, one of each seed.
type HitTable = dict[str, dict[str, list[Hits]]]
type Table = dict[str, dict[str, list[Scores]]]

#: Text below the table of the documentation.
BRIEF_CAPTION = (
    'Accuracy of land cover in %, mean over {seeds} seeds. Clear: clouds hide less than 5 % of the '
    'window; partly: 5 to 60 %; overcast: 60 % or more. Patches: the mean of the patch tokens; for '
    'patch words and band statistics, their only feature. Models with a withheld sensor, the CLS '
    'token, each seed and standard errors are in '
    '[experiments/results/fusion.md](../experiments/results/fusion.md).'
)

PRETRAINED, WITHOUT = 'pretrained', 'pretrained, one sensor withheld'
RANDOM, WORDS, STATISTICS = 'random weights', 'patch words', 'band mean and std'


def arguments(variant: str, data: Path, precision: str) -> list[str]:
    """Return the arguments that turn `quickstart.yaml` into a row of the table."""
    found = [f'{TASK}model=geofm_vit_nano_patch16_{variant}', f'{DATA}paths={data}']
    found.append(f'--trainer.precision={precision}')
    if variant in SENSORS:
        bands = SENSORS[variant].band_names
        found.append(f'{TASK}in_channels={len(bands)}')
        found.append(f'{DATA}bands={json.dumps(bands)}')
    else:
        found.append(f'{TASK}sensor_dropout={SENSOR_DROPOUT}')
    return found


def predictions(
    bank: Mapping[str, Tensor], labels: Tensor, queries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the predicted class of each query, by measure."""
    found = {
        f'{feature}, {NEIGHBOURS}-NN': knn_predict(vectors, labels, queries[feature], NEIGHBOURS)
        for feature, vectors in bank.items()
    }
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(torch.cat(list(bank.values()), dim=1), labels)
    predicted = model.predict(torch.cat(list(queries.values()), dim=1))
    return {**found, 'logistic regression': torch.from_numpy(predicted)}


def by_sky(hits: Hits, shares: npt.NDArray[np.float64]) -> Scores:
    """Return the accuracy of the windows under each sky."""
    scores: Scores = {}
    for sky, chosen in skies(shares).items():
        here = torch.from_numpy(chosen)
        scores[sky] = {measure: float(hit[here].double().mean()) for measure, hit in hits.items()}
    return scores


class Bench:
    """Training windows, test windows, and the sky over the test windows."""

    def __init__(self, data: Path) -> None:
        self.bank = SampleLandCover(data, 'train')
        self.queries = [SampleLandCover(data, split) for split in ('val', 'test')]
        self.shares = np.concatenate([hidden_shares(data, part) for part in self.queries])
        #: Number of the place of each test window, which is seen under several skies.
        self.places = pd.factorize(
            pd.Series(
                [
                    (*pair[:3], row, col)
                    for part in self.queries
                    for pair, row, col in zip(
                        pairs_of(part), part.index['row'], part.index['col'], strict=True
                    )
                ]
            )
        )[0]

    def measure(self, features: Any) -> Hits:
        """Return the hits of ``features(dataset)``, which returns vectors by name, and labels."""
        bank, labels = features(self.bank)
        parts = [features(part) for part in self.queries]
        queries = {name: torch.cat([vectors[name] for vectors, _ in parts]) for name in bank}
        truth = torch.cat([labels for _, labels in parts])
        predicted = predictions(bank, labels, queries)
        return {measure: classes == truth for measure, classes in predicted.items()}

    def tokens(self, backbone: MultiSensorViT, given: tuple[bool, ...] | None = None) -> Hits:
        """Return the hits of the tokens of a backbone."""
        return self.measure(lambda dataset: token_features(backbone.eval(), dataset, given))

    def baseline(self, encoder: Encoder, bands: Sequence[str]) -> Hits:
        """Return the hits of a baseline with a single vector."""
        return self.measure(lambda dataset: pooled_features(encoder, dataset, bands))

    def about(self) -> dict[str, dict[str, int]]:
        """Return the number of windows and of their places under each sky."""
        return {
            sky: {
                'windows': int(chosen.sum()),
                'places': len(np.unique(self.places[chosen])),
            }
            for sky, chosen in skies(self.shares).items()
        }


def random_backbone(checkpoint: Path, seed: int) -> MultiSensorViT:
    """Return the architecture of a checkpoint with random weights."""
    torch.manual_seed(seed)
    return create_backbone(read_hparams(checkpoint))


def measure_all(
    checkpoints: Mapping[str, Sequence[Path]], seeds: Sequence[int], bench: Bench
) -> HitTable:
    """Compute the hits of all rows of the table.

    Args:
        checkpoints: Of each backbone, one a seed.
        seeds: The seeds.
        bench: What they are measured on.
    """
    found: HitTable = {PRETRAINED: {}, WITHOUT: {}, RANDOM: {}, WORDS: {}, STATISTICS: {}}
    for name, paths in track(checkpoints.items(), description='Rows'):
        backbones = [load_backbone(path) for path in paths]
        found[PRETRAINED][name] = [bench.tokens(backbone) for backbone in backbones]
        found[RANDOM][name] = [
            bench.tokens(random_backbone(path, seed))
            for path, seed in zip(paths, seeds, strict=True)
        ]
        if len(backbones[0].sensors) == 2:
            for less, given in WITHHELD.items():
                found[WITHOUT][f'{name}, {less}'] = [bench.tokens(b, given) for b in backbones]
    for name, bands in SENSOR_BANDS.items():
        found[WORDS][name] = [
            bench.baseline(patch_words(bench.bank, bands, seed), bands) for seed in seeds
        ]
        found[STATISTICS][name] = [bench.baseline(StatisticsEncoder(), bands)]
    return found


def gains(
    found: HitTable, shares: npt.NDArray[np.float64], places: npt.NDArray[np.intp]
) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Return what a second sensor adds to the accuracy of the pretrained backbones.

    A fused backbone is compared with the better backbone of one sensor, and a fused backbone that
    is given one sensor with the backbone of this sensor, on the same windows. The hits are averaged
    over the seeds. Errors are those of a mean over clusters, the windows of a place, and do not
    include the variation between seeds.

    Args:
        found: Hits of all rows.
        shares: Fraction of each window that clouds hide.
        places: Number of the place of each window.

    Returns:
        Difference of the accuracies and two standard errors, by row, sky and measure.
    """
    single = found[PRETRAINED]
    pairs: dict[str, tuple[str, ...]] = {
        name: ('S1', 'S2') for name in single if name not in ('S1', 'S2')
    }
    pairs |= {name: ('S2',) if name.endswith('without S1') else ('S1',) for name in found[WITHOUT]}
    rows = {**single, **found[WITHOUT]}
    table: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for name, others in pairs.items():
        for sky, chosen in skies(shares).items():
            for measure in MEASURES:
                ours, *theirs = (
                    torch.stack([hits[measure].double() for hits in row])
                    .mean(dim=0)
                    .numpy()[chosen]
                    for row in (rows[name], *(single[other] for other in others))
                )
                difference = ours - max(theirs, key=lambda accuracy: float(accuracy.mean()))
                cell = float(difference.mean()), clustered_error(difference, places[chosen])
                table.setdefault(name, {}).setdefault(sky, {})[measure] = cell
    return table


def clustered_error(values: npt.NDArray[np.float64], clusters: npt.NDArray[np.intp]) -> float:
    """Return two standard errors of a mean of values that depend on each other in a cluster."""
    sums = np.bincount(clusters, values - values.mean())
    return float(2 * np.sqrt((sums**2).sum()) / len(values))


def gains_markdown(table: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]) -> str:
    """Return a Markdown table of :func:`gains`; losses beyond two standard errors are bold."""
    columns = [(measure, sky) for measure in MEASURES for sky in SKIES]
    lines = [
        '| difference | ' + ' | '.join(f'{measure}: {sky}' for measure, sky in columns) + ' |',
        '|---|' + '---:|' * len(columns),
    ]
    for name, row in table.items():
        cells = []
        for measure, sky in columns:
            gain, error = row[sky][measure]
            text = f'{100 * gain:+.1f} ± {100 * error:.1f}'
            cells.append(f'**{text}**' if gain < -error else text)
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


GAINS_CAPTION = (
    'Difference from the better backbone of one sensor (rows of both sensors) or from the backbone '
    'that was pretrained on the given sensor alone (rows with a withheld sensor), in percentage '
    'points, with two standard errors over places. Bold: a loss of more than two standard errors.'
)


def cell(values: Sequence[float], brief: bool = False) -> str:
    """Return the mean over the seeds and, unless it is to be brief, each seed."""
    each = ', '.join(f'{100 * value:.1f}' for value in values)
    return (
        f'{100 * mean(values):.1f} ({each})'
        if len(values) > 1 and not brief
        else f'{100 * mean(values):.1f}'
    )


def markdown(found: Table, measures: Sequence[str] = MEASURES, *, brief: bool = False) -> str:
    """Return a Markdown table with one row per backbone and one column per measure and sky."""
    columns = [(measure, sky) for measure in measures for sky in SKIES]
    lines = [
        '| backbone | ' + ' | '.join(f'{measure}: {sky}' for measure, sky in columns) + ' |',
        '|---|' + '---:|' * len(columns),
    ]
    for kind, rows in found.items():
        for name, seeds in rows.items():
            cells = [
                cell([s[sky][measure] for s in seeds], brief) if measure in seeds[0][sky] else '–'
                for measure, sky in columns
            ]
            lines.append(f'| {kind}: {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def brief(found: Table) -> str:
    """Return the table of the documentation: fused and single sensors beside three baselines."""
    rows = {
        PRETRAINED: found[PRETRAINED],
        RANDOM: {'S1 + S2, joint': found[RANDOM]['S1 + S2, joint']},
        WORDS: {'S1 + S2': found[WORDS]['S1 + S2']},
        STATISTICS: {'S1 + S2': found[STATISTICS]['S1 + S2']},
    }
    return markdown(rows, PICTURED, brief=True)


def two_errors(share: float, count: int) -> float:
    """Return two standard errors of a fraction of *count* independent windows."""
    return float(2 * (share * (1 - share) / count) ** 0.5)


def caption(about: Mapping[str, Mapping[str, int]], seeds: Sequence[int], precision: str) -> str:
    """Return the caption: what the scores are and how uncertain they are."""
    names = {
        'clear': 'clear (clouds hide less than 5 % of the window)',
        'partly': 'partly (5 to 60 %)',
        'overcast': 'overcast (60 % or more)',
    }
    counts = '; '.join(
        f'{names[sky]}: {n["windows"]} windows of {n["places"]} places, two standard errors are '
        f'up to {100 * two_errors(0.5, n["windows"]):.0f} points'
        for sky, n in about.items()
    )
    return (
        f'Accuracy of land cover in %, made by `python experiments/fusion.py`; {EPOCHS} '
        f'epochs; seeds: {len(seeds)}, precision {precision}. {counts}. Windows of a place are '
        'not independent, so the true errors are larger. Patch words and band statistics are a '
        'single vector, whose 5-NN accuracy is given under patches. The data are generated.'
    )


def draw(found: Table, about: Mapping[str, Mapping[str, int]]) -> Figure:
    """Draw bars for each backbone and sky; dashed: random weights, dotted: baselines.

    The measures are those of the brief table. The figure is narrow, so that it can be read on a
    phone.
    """
    figure = Figure(figsize=(5, 7.6), layout='constrained')
    axes = figure.subplots(len(PICTURED), 1, sharey=True)
    names = list(found[PRETRAINED])
    width = 0.8 / len(names)
    for ax, measure in zip(axes, PICTURED, strict=True):
        for x, sky in enumerate(SKIES):
            for i, name in enumerate(names):
                left = x - 0.4 + i * width
                value = mean(s[sky][measure] for s in found[PRETRAINED][name])
                floor = mean(s[sky][measure] for s in found[RANDOM][name])
                ax.bar(
                    left + width / 2,
                    100 * value,
                    0.92 * width,
                    yerr=100 * two_errors(value, about[sky]['windows']),
                    color=f'C{i}',
                    ecolor='0.35',
                    capsize=1.5,
                    error_kw={'lw': 0.8},
                    label=name if x == 0 and ax is axes[0] else None,
                )
                ax.plot(
                    [left, left + width],
                    [100 * floor] * 2,
                    'k--',
                    lw=1.2,
                    label='random weights' if i == x == 0 and ax is axes[0] else None,
                )
            for kind, color in ((WORDS, 'black'), (STATISTICS, 'crimson')):
                floors = found[kind]['S1 + S2']
                if measure in floors[0][sky]:
                    ax.plot(
                        [x - 0.4, x + 0.4],
                        [100 * mean(scores[sky][measure] for scores in floors)] * 2,
                        color=color,
                        ls=':',
                        lw=1.5,
                        label=f'{kind}, S1 + S2' if x == 0 and ax is axes[0] else None,
                    )
        ax.set_title(measure, fontsize='large')
        ax.set_xticks(
            range(len(SKIES)), [f'{sky}\n{about[sky]["windows"]} windows' for sky in SKIES]
        )
        ax.set_ylim(0, 100)
        ax.grid(axis='y', alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
        ax.set_ylabel('accuracy, %')
    figure.legend(loc='outside lower center', ncols=2, frameon=False, columnspacing=1)
    return figure


def write_picture(found: Table, about: Mapping[str, Mapping[str, int]]) -> None:
    """Write the figure of the documentation."""
    with atomic_file(FIGURE) as part:
        draw(found, about).savefig(part, dpi=200)


def main() -> None:
    """Run and evaluate all rows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, default=Path('data/sample'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--output', type=Path, default=Path('output/fusion'))
    parser.add_argument('--precision', default='32-true', help="the trainer's: e.g. bf16-mixed")
    parser.add_argument('--only-picture', action='store_true', help='of the results file')
    options = parser.parse_args()
    if options.only_picture:
        content = json.loads((RESULTS / 'fusion.json').read_text(encoding='utf-8'))
        write_picture(content['accuracy'], content['skies'])
        return
    checkpoints = {
        name: [
            pretrain(
                QUICKSTART,
                arguments(variant, options.data, options.precision),
                EPOCHS,
                seed,
                options.output / variant / options.precision / f'seed_{seed}',
            )
            for seed in options.seeds
        ]
        for name, variant in BACKBONES.items()
    }
    bench = Bench(options.data)
    hits, about = measure_all(checkpoints, options.seeds, bench), bench.about()
    found: Table = {
        kind: {name: [by_sky(h, bench.shares) for h in each] for name, each in rows.items()}
        for kind, rows in hits.items()
    }
    added = gains(hits, bench.shares, bench.places)
    text = f'{markdown(found)}\n\n{caption(about, options.seeds, options.precision)}\n\n'
    text += f'{gains_markdown(added)}\n\n{GAINS_CAPTION}'
    print(text)
    content = {
        'seeds': options.seeds,
        'epochs': EPOCHS,
        'precision': options.precision,
        'neighbours': NEIGHBOURS,
        'skies': {sky: {'hidden': SKIES[sky], **counts} for sky, counts in about.items()},
        'accuracy': found,
        'gain': added,
    }
    write_picture(found, about)
    write_results(RESULTS, 'fusion', content, text)
    write_text(
        RESULTS / 'fusion_brief.md',
        f'{brief(found)}\n\n{BRIEF_CAPTION.format(seeds=len(options.seeds))}',
    )
    tables.main()


if __name__ == '__main__':
    main()
