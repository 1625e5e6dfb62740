import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rasterio.windows import Window
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchgeo.datasets import stack_samples

from geofm.datasets.landcover import SampleLandCover, window_labels
from geofm.datasets.sen12mscrts import SEN12MSCRTS
from geofm.datasets.splitting import Split
from geofm.sample import DEFAULT_ROIS, LAND_COVER, write_sample_data
from geofm.sensors import BANDS

WINDOW = 16
SPLITS: tuple[Split, ...] = ('train', 'val', 'test')

type Array = npt.NDArray[Any]


@pytest.fixture(scope='module')
def root(module_path: Path) -> Path:
    return write_sample_data(module_path / 'data', size=64).path


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    """A small data set that the test may damage."""
    rois = DEFAULT_ROIS[:1]
    return write_sample_data(tmp_path / 'data', rois, 2, 2, size=32).path


def land_cover_of(root: Path, row: Any) -> Array:
    path = root / row.season / str(row.roi) / 'LC' / f'lc_{row.season}_{row.roi}_patch_{row.patch}'
    with rasterio.open(f'{path}.tif') as src:
        pixels: Array = src.read(1)
    return pixels


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 7)),
    st.integers(1, 4),
)
def test_window_labels_are_those_of_counting(land_cover: Array, window: int) -> None:
    labels, purity = window_labels(land_cover, window)
    assert labels.shape == purity.shape == tuple(n // window for n in land_cover.shape)
    for (row, col), label in np.ndenumerate(labels):
        block = land_cover[row * window : (row + 1) * window, col * window : (col + 1) * window]
        counts = [int((block == value).sum()) for value in range(len(LAND_COVER))]
        assert label == counts.index(max(counts))
        assert purity[row, col] == max(counts) / window**2


@pytest.mark.parametrize('min_purity', [0.0, 0.6, 1.0])
def test_windows_are_those_of_brute_force(root: Path, min_purity: float) -> None:
    dataset = SampleLandCover(root, 'val', WINDOW, min_purity)
    expected, mixed = [], 0
    for pair, scene in enumerate(SEN12MSCRTS(root, 'val').index.itertuples()):
        land_cover = land_cover_of(root, scene)
        for row in range(0, 64, WINDOW):
            for col in range(0, 64, WINDOW):
                block = land_cover[row : row + WINDOW, col : col + WINDOW]
                values, counts = np.unique(block, return_counts=True)
                if counts.max() >= min_purity * WINDOW**2:
                    expected.append((pair, row, col, values[counts.argmax()]))
                else:
                    mixed += 1
    assert list(dataset.index.itertuples(index=False, name=None)) == expected
    assert (len(dataset), dataset.left_out) == (len(expected), mixed)
    assert len(expected) + mixed == 3 * 4 * 4 * 16
    assert (mixed == 0) == (min_purity == 0)


def test_a_sample_is_the_window_of_both_files_and_of_the_map(root: Path) -> None:
    dataset = SampleLandCover(root, 'test', WINDOW)
    for i in (0, len(dataset) // 2, -1):
        pair, row, col, label = dataset.index.iloc[i]
        scene = dataset.pairs.index.iloc[pair]
        window = Window(col, row, WINDOW, WINDOW)
        with rasterio.open(scene.s1) as s1, rasterio.open(scene.s2) as s2:
            image = np.concatenate([src.read(window=window).astype('float32') for src in (s1, s2)])
            transform, bounds = s2.window_transform(window), s2.window_bounds(window)
        sample = dataset[i]
        np.testing.assert_array_equal(sample['image'].numpy(), image)
        block = land_cover_of(root, scene)[row : row + WINDOW, col : col + WINDOW]
        np.testing.assert_array_equal(sample['mask'].numpy(), block)
        assert (sample['mask'].dtype, sample['label'].dtype) == (torch.int64, torch.int64)
        assert sample['label'] == label == np.bincount(block.ravel()).argmax()
        assert sample['valid'].all()
        np.testing.assert_allclose(sample['transform'].numpy(), tuple(transform)[:6], rtol=1e-12)
        np.testing.assert_allclose(sample['bounds'].numpy(), bounds, rtol=1e-12)
        assert stack_samples([sample, dataset[0]])['mask'].shape == (2, WINDOW, WINDOW)


def test_splits_share_no_region(root: Path) -> None:
    rois = [
        set(zip(index.season, index.roi, strict=True))
        for index in (SampleLandCover(root, split, WINDOW).pairs.index for split in SPLITS)
    ]
    assert [len(some) for some in rois] == [8, 3, 3]
    assert len(set.union(*rois)) == 14


def test_bands_by_name_and_transforms(root: Path) -> None:
    plain = SampleLandCover(root, 'val', WINDOW)[5]
    bands = ('B08', 'VH', 'B02')
    dataset = SampleLandCover(
        root,
        'val',
        WINDOW,
        bands=bands,
        transforms=lambda sample: sample | {'seen': torch.ones(())},
    )
    assert torch.equal(dataset[5]['image'], plain['image'][[BANDS.index(band) for band in bands]])
    assert dataset[5]['seen'] == 1
    assert dataset.classes[int(plain['label'])] == LAND_COVER[int(plain['label'])].name


def test_clear_dates_are_those_of_the_table(root: Path) -> None:
    dataset = SampleLandCover(root, 'all', WINDOW, 0, dates='clear')
    scenes = pd.read_csv(root / 'scenes.csv')
    rows = dataset.pairs.index.iloc[dataset.index.pair.unique()]
    key = ['season', 'roi', 'patch', 'time_step']
    found = rows.reset_index(drop=True)[key].merge(scenes, on=key)
    assert len(found) == len(rows) == (scenes.cloud_cover <= 0.02).sum()
    assert 0 < len(rows) < len(scenes)


@pytest.fixture(scope='module')
def features(root: Path) -> dict[str, tuple[Array, Array]]:
    """Mean and standard deviation of each band, (N, 15, 2), and labels, of clear windows."""
    found: dict[str, tuple[Array, Array]] = {}
    for split in SPLITS:
        dataset = SampleLandCover(root, split, WINDOW, dates='clear')
        samples = [dataset[i] for i in range(len(dataset))]
        images = torch.stack([sample['image'] for sample in samples]).flatten(2)
        labels = torch.stack([sample['label'] for sample in samples])
        found[split] = torch.stack([images.mean(-1), images.std(-1)], 2).numpy(), labels.numpy()
    return found


@pytest.mark.parametrize(
    'classifier',
    [KNeighborsClassifier(5), LogisticRegression(max_iter=2000)],
    ids=['5-NN', 'logistic regression'],
)
def test_each_sensor_has_information_of_its_own(
    features: dict[str, tuple[Array, Array]], classifier: Any
) -> None:
    x, y = features['train']
    held_out = [features[split] for split in ('val', 'test')]
    accuracy = {}
    for name, channels in (('both', range(15)), ('s1', range(2)), ('s2', range(2, 15))):
        model = make_pipeline(StandardScaler(), classifier)
        model.fit(x[:, channels].reshape(len(x), -1), y)
        right = [model.predict(a[:, channels].reshape(len(a), -1)) == b for a, b in held_out]
        accuracy[name] = np.concatenate(right).mean()
    assert min(accuracy['s1'], accuracy['s2']) > 0.4
    assert accuracy['both'] > max(accuracy['s1'], accuracy['s2']) + 0.02
    assert accuracy['both'] < 0.95


def test_plot_names_classes_and_gives_them_their_colours(root: Path) -> None:
    dataset = SampleLandCover(root, 'val', WINDOW)
    sample = dataset[0] | {'prediction': torch.tensor(6)}
    fig = dataset.plot(sample)
    assert fig.get_suptitle() == f'label: {dataset.classes[sample["label"]]}, prediction: town'
    legend = {text.get_text() for text in fig.legends[0].get_texts()}
    assert legend == {dataset.classes[value] for value in sample['mask'].unique()}
    drawn = fig.axes[-1].images[0]
    color = drawn.to_rgba(np.array([[6]]))[0, 0, :3]
    np.testing.assert_allclose(color, np.array(LAND_COVER[6].color) / 255)
    titled = dataset.plot(sample, show_titles=False, suptitle='mine')
    assert titled.get_suptitle() == 'mine'
    assert not any(ax.get_title() for ax in titled.axes)


@pytest.mark.parametrize('damage', ['missing', 'moved', 'resized', 'value'])
def test_a_map_that_does_not_match_is_named(own_root: Path, damage: str) -> None:
    path = next(own_root.rglob('LC/*patch_1.tif'))
    if damage == 'missing':
        path.unlink()
    elif damage == 'moved':
        shutil.copy(path.with_name(path.name.replace('patch_1', 'patch_0')), path)
    else:
        with rasterio.open(path) as src:
            profile, pixels = src.profile, src.read()
        pixels[0, 3, 4] = 99 if damage == 'value' else 1
        if damage == 'resized':
            profile['width'], pixels = 31, pixels[..., :31]
        with rasterio.open(path, 'w', **profile) as dst:
            dst.write(pixels)
    message = {
        'missing': r'land-cover map not found.*geofm sample-data',
        'moved': 'not on the pixel grid of .*s2_',
        'resized': 'not on the pixel grid of .*s2_',
        'value': 'value 99',
    }
    with pytest.raises(ValueError, match=rf'{path.name}: {message[damage]}'):
        SampleLandCover(own_root, 'train', WINDOW, 0)


def test_clear_dates_need_the_table_of_scenes(own_root: Path) -> None:
    (own_root / 'scenes.csv').unlink()
    assert len(SampleLandCover(own_root, 'train', WINDOW, 0)) == 2 * 2 * 4
    with pytest.raises(ValueError, match=r'scenes.csv: not found'):
        SampleLandCover(own_root, 'train', WINDOW, 0, dates='clear')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'window': 0}, 'window must be'),
        ({'min_purity': 1.5}, 'min_purity 0 to 1'),
        ({'dates': 'cloudy'}, "unknown dates 'cloudy'"),
        ({'window': 64}, 'no window of 64 pixels'),
    ],
)
def test_bad_arguments_are_refused(own_root: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleLandCover(own_root, 'train', **arguments)


def test_an_index_beyond_the_end_is_refused(own_root: Path) -> None:
    dataset = SampleLandCover(own_root, 'train', WINDOW, 0)
    with pytest.raises(IndexError, match='window 16 of 16'):
        dataset[16]
