"""From a configuration and labels to a map of an unseen place, and its accuracy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import torch
import yaml
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from sklearn.metrics import precision_recall_fscore_support as prf
from torchgeo.tasks import SemanticSegmentation

from geofm.cli import main
from geofm.datamodules import LabelledArchiveDataModule
from geofm.datasets import RasterArchive, write_sample_scenes
from geofm.legend import NO_CLASS, Legend
from geofm.sample import DEFAULT_ROIS
from tests.test_doors import CONFIGS, reduced, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIDE = 192

#: Of the configurations in configs/finetune, what is smaller here. Model and split are theirs.
SMALLER = [
    *('--trainer.max_steps=2', '--trainer.max_epochs=1', '--trainer.limit_val_batches=1'),
    *('--trainer.num_sanity_val_steps=0', '--trainer.enable_progress_bar=false'),
    *('--trainer.accelerator=cpu', '--trainer.logger=false', '--data.init_args.batch_size=2'),
    '--data.init_args.window_size=64',
    '--trainer.callbacks.init_args.save_top_k=0',
]


@pytest.fixture(scope='module')
def folder(module_path: Path) -> Path:
    """Smaller scenes of the sample data with their table, at the path of the configurations."""
    scenes = write_sample_scenes(
        module_path / 'data' / 'scenes', 'scene', DEFAULT_ROIS[:6], 1, SIDE
    )
    layout = ROOT / 'configs' / 'layouts' / 'scenes.yaml'
    table = module_path / 'data' / 'scenes.parquet'
    main(['index', str(scenes), '--layout', str(layout), '--output', str(table)])
    return module_path


def fit(name: str, root: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    """Fine-tune with a configuration; return the checkpoint and the configuration of the data."""
    config = ROOT / 'configs' / 'finetune' / f'{name}.yaml'
    main(['fit', f'--config={config}', f'--trainer.default_root_dir={root}', *SMALLER, *options])
    (checkpoint,) = root.rglob('last.ckpt')
    data: dict[str, Any] = yaml.safe_load(config.read_text())['data']['init_args']
    return checkpoint, data


def held_out(data: dict[str, Any]) -> dict[str, Path]:
    """Files of the single place of the test split."""
    archive = RasterArchive(
        data['table'], data['sensors'], split='test', split_by=data['split'], window_size=96
    )
    assert len(np.unique(archive.index['place'])) == 1
    return {key: Path(archive.index[key].iloc[0]) for key in data['sensors']}


def one_pass(checkpoint: Path, data: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Logits (K, H, W) of the place of the test split as one image, by TorchGeo's task."""
    arguments = {**data, 'window_size': None}
    module = LabelledArchiveDataModule(**arguments)
    state = torch.load(checkpoint, weights_only=False)
    module.load_state_dict(state['LabelledArchiveDataModule'])
    module.setup('test')
    batch = next(iter(module.test_dataloader()))
    task = SemanticSegmentation.load_from_checkpoint(
        checkpoint, weights=None, weights_only=False
    ).eval()
    with torch.inference_mode():
        found = task(module.aug(batch)['image'])[0]
    logits: npt.NDArray[np.float32] = found.numpy()
    return logits


@pytest.mark.parametrize(
    ('name', 'method'), [('archive_segmentation', None), ('archive_points', 'frozen')]
)
def test_labels_become_a_map(
    name: str, method: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From scratch, and from a pretraining checkpoint."""
    monkeypatch.chdir(folder)
    options = [] if method is None else [f'--adapt.method={method}']
    if method is not None:
        pretrained = write_checkpoint(tmp_path / 'pretrained.ckpt', **reduced(CONFIGS['archive']))
        options += [f'--model.init_args.weights={pretrained}']
    checkpoint, data = fit(name, tmp_path / 'output', *options)
    files = held_out(data)
    truth = files['s2'].parent / 'land_cover.tif'
    output = tmp_path / 'maps'
    command = ['predict', str(checkpoint), '--output', str(output), '--reference', str(truth)]
    command += [arg for key, file in files.items() for arg in ('--scene', f'{key}={file}')]
    main([*command, '--window', str(SIDE), '--block_pixels', '32'])
    with (
        rasterio.open(output / f'{files["s2"].stem}_classes.tif') as src,
        rasterio.open(files['s2']) as scene,
        rasterio.open(truth) as labels,
    ):
        assert (src.crs, src.transform, src.shape) == (scene.crs, scene.transform, scene.shape)
        assert (src.nodata, src.dtypes) == (NO_CLASS, ('uint8',))
        assert src.tags(ns='IMAGE_STRUCTURE')['LAYOUT'] == 'COG'
        classes, expected = src.read(1), labels.read(1)
        legend = Legend.from_tags(src.tags())
        has_data = scene.dataset_mask() > 0
    assert legend is not None
    assert {c.name: c.value for c in legend.classes} == {
        key: value['value'] for key, value in data['classes'].items()
    }
    # The window is the scene, so the prediction equals that of TorchGeo's task.
    logits = one_pass(checkpoint, data)
    top = np.sort(logits, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    known = classes != NO_CLASS
    assert known.mean() > 0.9
    assert not (known & ~has_data).any()
    assert (classes == logits.argmax(axis=0))[known & clear].all()
    assert clear.mean() > 0.99
    check_scores(output / f'{files["s2"].stem}_classes_accuracy.json', expected, classes)


def check_scores(file: Path, truth: npt.NDArray[np.uint8], classes: npt.NDArray[np.uint8]) -> None:
    """Compare the written scores with scikit-learn's for the same pixels."""
    both = (classes != NO_CLASS) & (truth != NO_CLASS)
    y, guess = truth[both], classes[both]
    said = json.loads(file.read_text())
    values = [c['value'] for c in said['legend']]
    assert said['samples'] == both.sum()
    np.testing.assert_array_equal(said['confusion'], confusion_matrix(y, guess, labels=values))
    assert said['overall']['accuracy']['value'] == pytest.approx(accuracy_score(y, guess))
    occurs = np.isin(values, np.union1d(y, guess))
    precision, recall, f1, _ = prf(y, guess, labels=values, zero_division=0)
    iou = jaccard_score(y, guess, labels=values, average=None, zero_division=0)
    for key, scores in (('iou', iou), ('precision', precision), ('recall', recall), ('f1', f1)):
        own = np.array([s[key]['value'] or 0 for s in said['classes'].values()], float)
        np.testing.assert_allclose(own, scores, err_msg=key)
    assert said['overall']['mean_iou']['value'] == pytest.approx(iou[occurs].mean())
    assert said['overall']['mean_f1']['value'] == pytest.approx(f1[occurs].mean())
