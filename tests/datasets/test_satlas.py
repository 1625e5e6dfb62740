"""Land cover of SatlasPretrain: masks, parts, and the config on TorchGeo's stand-in."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geofm.cli import main
from geofm.datasets import SatlasLandCover

CONFIG = Path(__file__).resolve().parents[2] / 'configs' / 'finetune' / 'satlas.yaml'
TILES = [[7149, 3246], [1234, 5678]]


@pytest.fixture
def satlas(shared_data: Path, tmp_path: Path) -> Path:
    """The stand-in with known land cover in both tiles."""
    root = tmp_path / 'satlas'
    root.mkdir()
    source = shared_data / 'torchgeo' / 'satlas'
    if not source.is_dir():
        pytest.skip(f'needs {source}, which a clone of the repository does not have')
    for name in ('sentinel2', 'metadata'):
        (root / name).symlink_to(source / name)
    rng = np.random.default_rng(0)
    for col, row in TILES:
        folder = root / 'static' / f'{col}_{row}'
        folder.mkdir(parents=True)
        classes = rng.integers(0, 12, (32, 32), dtype=np.uint8)
        Image.fromarray(classes).save(folder / 'land_cover.png')
    return root


def test_masks_are_the_files_and_parts_do_not_overlap(satlas: Path) -> None:
    dataset = SatlasLandCover(satlas, 'all')
    assert len(dataset) == 2
    for i, (col, row) in enumerate(TILES):
        classes = np.array(Image.open(satlas / f'static/{col}_{row}/land_cover.png'))
        mask = dataset[i]['mask'].numpy()
        np.testing.assert_array_equal(mask, classes.repeat(16, 0).repeat(16, 1))
    (satlas / 'static/1234_5678/land_cover.png').unlink()
    assert len(SatlasLandCover(satlas, 'all')) == 1
    with pytest.raises(ValueError, match='none of 2 tiles'):
        SatlasLandCover(satlas, 'val', val=0.0)
    tiles = json.dumps([[i, j] for i in range(64) for j in range(64)])
    (satlas / 'static').rename(satlas / 'old')
    (satlas / 'metadata').unlink()
    (satlas / 'metadata').mkdir()
    (satlas / 'metadata/train_lowres.json').write_text(tiles)
    (satlas / 'metadata/good_images_lowres_all.json').write_text('[[0, 0, "x"]]')
    (satlas / 'metadata/image_times.json').write_text('{"x": "2022-03-09T00:00:00Z"}')
    for i, j in json.loads(tiles):
        (satlas / f'static/{i}_{j}').mkdir(parents=True)
        (satlas / f'static/{i}_{j}/land_cover.png').touch()
    parts = [SatlasLandCover(satlas, part, val=0.3).split for part in ('train', 'val')]
    blocks = [set(zip(part['col'] // 8, part['row'] // 8, strict=True)) for part in parts]
    assert not blocks[0] & blocks[1]
    assert len(blocks[0]) + len(blocks[1]) == 64
    assert 0.1 < len(blocks[1]) / 64 < 0.5


def test_the_config_trains_two_steps(satlas: Path, tmp_path: Path) -> None:
    data = '--data.init_args'
    main(
        [
            'fit',
            f'--config={CONFIG}',
            # Without a checkpoint, the nine bands of the backbone must be named.
            '--model.init_args.model=unet',
            '--model.init_args.backbone=resnet18',
            f'{data}.train_dataset.init_args.root={satlas}',
            f'{data}.train_dataset.init_args.part=all',
            f'{data}.val_dataset.init_args.root={satlas}',
            f'{data}.val_dataset.init_args.part=all',
            f'{data}.batch_size=1',
            f'{data}.num_workers=0',
            '--trainer.precision=32',
            '--trainer.accelerator=cpu',
            '--trainer.max_epochs=1',
            '--trainer.limit_val_batches=1',
            '--trainer.num_sanity_val_steps=0',
            '--trainer.enable_progress_bar=false',
            *('--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.save_weights_only=true'),
            f'--trainer.default_root_dir={tmp_path / "run"}',
        ]
    )
    (checkpoint,) = (tmp_path / 'run').rglob('*.ckpt')
    content = torch.load(checkpoint, weights_only=False)
    assert content['global_step'] == 2
    weights = content['state_dict'].values()
    assert all(tensor.isfinite().all() for tensor in weights if tensor.is_floating_point())
