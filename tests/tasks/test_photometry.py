from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import Dataset

from geofm.cli import main
from geofm.datamodules import NamedBandsDataModule
from geofm.tasks import DINOv2
from geofm.tasks.nonfinite import replay
from geofm.transforms import Normalize
from tests.tasks.test_dinov2 import SMALL, small_trainer

BANDS = ['B04', 'B02']
MEAN, STD = {'B04': 1000.0, 'B02': 1100.0}, {'B04': 600.0, 'B02': 300.0}


class Grounds(Dataset[dict[str, torch.Tensor]]):
    """Images of one value a band."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {'image': torch.rand(2, 32, 32, generator=generator) * 3000}


def task(**kwargs: Any) -> DINOv2:
    model = {'model': 'geofm_vit_nano_patch8_s2', 'in_channels': 2, 'bands': BANDS}
    return DINOv2(**{**SMALL, **model, **kwargs})


def data(bands: list[str] = BANDS) -> NamedBandsDataModule:
    return NamedBandsDataModule(
        bands, train_dataset=Grounds(), mean=MEAN, std=STD, batch_size=4, seed=0
    )


@pytest.mark.parametrize('bands', [BANDS, BANDS[::-1]])
def test_haze_is_of_its_size_with_the_statistics_of_the_data_module(
    tmp_path: Path, bands: list[str]
) -> None:
    same = (1.0, 1.0)
    haze = {'gain': same, 'band_gain': same, 'haze': (0.02, 0.02), 'probability': 1.0}
    pretraining, module = task(photometry=haze), data(bands)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(pretraining, module)
    assert pretraining.multi_crop.photometry is not None
    assert isinstance(module.aug, Normalize)
    crops = torch.zeros(3, 2, 4, 4)
    hazy = module.aug.denormalize(pretraining.multi_crop.photometry(crops.clone()))
    added = hazy - module.aug.denormalize(crops)
    torch.testing.assert_close(added, torch.full((3, 2, 4, 4), 200.0))


def test_a_step_is_replayed_with_the_statistics_of_its_data(tmp_path: Path) -> None:
    losses: dict[str, float] = {}

    class Exploding(DINOv2):
        def on_after_backward(self) -> None:
            names = ('dino', 'ibot', 'koleo')
            metrics = self.trainer.callback_metrics
            losses.update({name: metrics[f'train_{name}'].item() for name in names})
            next(self.student['dino_head'].parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]

    hparams = dict(task().hparams)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    with pytest.raises(FloatingPointError, match='nonfinite-step0'):
        trainer.fit(Exploding(**hparams), data())
    again = replay(tmp_path / 'nonfinite-step0-rank0.pt')
    assert {name: again[name] for name in losses} == pytest.approx(losses, abs=0)


def test_strength_from_a_configuration(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        'seed_everything': 0,
        'trainer': {'default_root_dir': str(tmp_path), 'fast_dev_run': 1, 'accelerator': 'cpu'},
        'model': {
            'class_path': 'geofm.tasks.DINOv2',
            'init_args': {**SMALL, 'photometry': {'gain': [0.9, 1.1], 'haze': [0.0, 0.01]}},
        },
        'data': {'class_path': 'tests.pairs.RandomPairsDataModule'},
    }
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(config))
    main(['fit', f'--config={path}'])
    with pytest.raises(SystemExit):
        main(['fit', f'--config={path}', '--model.init_args.photometry={hase: [0, 1]}'])
