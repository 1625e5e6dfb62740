"""Images transferred as integers are equal bit for bit."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from geofm.datamodules import NamedBandsDataModule
from geofm.datamodules.narrow import narrow, widen
from geofm.sensors import BANDS

S1_BANDS = BANDS[:2]


def images() -> Tensor:
    """Backscatter with NaN, and numbers in the whole range of uint16."""
    s1 = -10 * torch.rand(4, 2, 8, 8)
    s1[1, 0, 2, 3] = torch.nan
    s2 = torch.randint(0, 2**16, (4, 13, 8, 8)).float()
    return torch.cat([s1, s2], dim=1)


@pytest.mark.parametrize('mixed', [False, True])
def test_parts_have_the_smallest_exact_type(mixed: bool) -> None:
    image, bands = images(), list(BANDS)
    if mixed:
        order = torch.randperm(len(bands))
        image, bands = image[:, order], [bands[i] for i in order]
    parts = narrow(image, bands)
    assert [part.dtype for part in parts] == [torch.float32, torch.uint16]
    again = widen(parts, bands)
    assert again.view(torch.int32).equal(image.view(torch.int32))


@pytest.mark.parametrize(
    ('value', 'kind'), [(-1.0, torch.int16), (0.5, torch.float32), (65536.0, torch.float32)]
)
def test_values_are_not_changed(value: float, kind: torch.dtype) -> None:
    image = torch.zeros(2, 3, 2, len(S1_BANDS), 4, 4)
    image[1, 2, 1, 0, 3, 3] = value
    (part,) = narrow(image, S1_BANDS)
    assert part.dtype == kind
    assert widen([part], S1_BANDS).equal(image)


class Pairs(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.images = images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'image': self.images[index], 'dates': torch.tensor([17_600, 17_603])}


class Spy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_training_sees_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, Any]]] = []
    sent: list[Any] = []
    transfer = NamedBandsDataModule.transfer_batch_to_device

    def watch(self: Any, batch: Any, *args: Any) -> Any:
        sent.append(batch['image'])
        return transfer(self, batch, *args)

    monkeypatch.setattr(NamedBandsDataModule, 'transfer_batch_to_device', watch)
    for as_integers in (False, True):
        torch.manual_seed(0)
        data = NamedBandsDataModule(list(BANDS), train_dataset=Pairs(), batch_size=2, seed=0)
        data.images_as_integers = as_integers
        trainer = Trainer(
            accelerator='cpu',
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        spy = Spy()
        trainer.fit(spy, datamodule=data)
        seen.append(spy.batches)
    assert [isinstance(image, list) for image in sent] == [False, False, True, True]
    for plain, narrowed in zip(*seen, strict=True):
        assert plain.keys() == narrowed.keys()
        assert all(value.equal(narrowed[key]) for key, value in plain.items())
        assert not plain['valid'].all() or plain['image'].isfinite().all()
