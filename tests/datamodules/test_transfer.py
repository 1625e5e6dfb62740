"""Transfer of batches to a device without float64, such as Apple's GPUs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchgeo.datamodules import BaseDataModule

from geofm.datamodules import NamedBandsDataModule, SEN12MSCRTSDataModule
from geofm.datamodules.eurosat_rgb import EuroSATRGBDataModule
from geofm.datamodules.labelled_folder import LabelledFolderDataModule
from geofm.datamodules.landcover import SampleLandCoverDataModule
from geofm.datamodules.mmflood_height import MMFloodHeightDataModule
from geofm.datasets.collate import tensors_to
from geofm.sen12ms import PairKey
from geofm.sensors import BANDS
from tests.datasets.tree import grid_at, write_pair

MODULES: list[BaseDataModule] = [
    SEN12MSCRTSDataModule(),
    NamedBandsDataModule(list(BANDS), LabelledFolderDataModule('.')),
    EuroSATRGBDataModule(),
    LabelledFolderDataModule('.'),
    SampleLandCoverDataModule(),
    MMFloodHeightDataModule(),
]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors that are moved. They must not be float64."""
    tensors: list[Tensor] = []
    to = torch.Tensor.to

    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as it doesn't support it")
        tensors.append(self)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'to', refuse)
    return tensors


def places() -> dict[str, Tensor]:
    return {
        'image': torch.zeros(2, 15, 4, 4),
        'label': torch.tensor([0, 1]),
        'bounds': torch.zeros(2, 4, dtype=torch.float64),
        'transform': torch.zeros(2, 6, dtype=torch.float64),
    }


@pytest.mark.parametrize('module', MODULES, ids=lambda module: type(module).__name__)
def test_georeferences_stay_on_the_host(module: BaseDataModule, moved: list[Tensor]) -> None:
    batch = places()
    result = module.transfer_batch_to_device(batch, torch.device('cpu'), 0)
    assert list(result) == list(batch)
    assert result['bounds'] is batch['bounds']
    assert [tensor is batch[key] for tensor, key in zip(moved, ('image', 'label'), strict=True)]
    assert module.transfer_batch_to_device([batch['image']], torch.device('cpu'), 0)


def test_batches_of_real_pairs(tmp_path: Any, moved: list[Tensor]) -> None:
    for patch in range(2):
        write_pair(tmp_path, PairKey('ROIs1868', 36, patch, 0), grid_at(4326, 7, 47.5, size=48))
    module = SEN12MSCRTSDataModule(str(tmp_path), batch_size=2)
    module.setup('predict')
    (batch,) = module.predict_dataloader()
    device = torch.device('cpu')
    on_device = module.transfer_batch_to_device(
        module.on_before_batch_transfer(batch, 0), device, 0
    )
    assert on_device['transform'].dtype == torch.float64
    assert {'image', 'valid', 'dates'} <= tensors_to(batch, device).keys()
    assert not tensors_to(batch, device).keys() & {'transform', 'bounds'}


def test_pixels_keep_their_precision() -> None:
    """For example with precision 64-true."""
    image = torch.zeros(2, 15, 4, 4, dtype=torch.float64)
    batch = {**places(), 'image': image}
    assert tensors_to(batch, 'cpu').keys() == {'image', 'label'}
    moved = SEN12MSCRTSDataModule().transfer_batch_to_device(batch, torch.device('meta'), 0)
    assert moved['image'].device.type == 'meta'
    assert moved['image'].dtype == torch.float64
    assert moved['transform'].device.type == 'cpu'
