"""DPT and UPerNet on a backbone, trained by TorchGeo's tasks."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import segmentation_models_pytorch as smp
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.markup import escape
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchgeo.tasks import PixelwiseRegression, SemanticSegmentation

from geofm.datasets import tensors_to
from geofm.evaluation.backbones import Adapter, Backbone
from geofm.evaluation.data import LabelledData, Split
from geofm.evaluation.metrics import Prediction
from geofm.printing import counted, printable

#: Learning rates of AdamW with a frozen and with a fine-tuned backbone.
_LR = 1e-3
_TUNED_LR = 1e-4

#: Number that the sides of images must be a multiple of: the stride of the coarsest feature map of
#: both decoders.
_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder on a frozen or a fine-tuned backbone.

    Attributes:
        model: 'dpt' or 'upernet'.
        tuned: Whether the backbone is fine-tuned.
    """

    model: str
    tuned: bool

    @property
    def name(self) -> str:
        """Name in tables."""
        return f'{self.model}, {"tuned" if self.tuned else "frozen"}'


class UnsuitableError(ValueError):
    """Error of a backbone that does not support a decoder."""


def decoder_probe(
    decoder: Decoder,
    backbone: Backbone,
    data: LabelledData,
    train_targets: Tensor,
    classes: int,
    epochs: int,
    seed: int,
    device: str = 'cpu',
    progress: bool = True,
) -> Prediction:
    """Train a decoder on a backbone with TorchGeo, and predict the test split.

    Args:
        decoder: The decoder.
        backbone: The backbone, a copy of which is used.
        data: The data.
        train_targets: Targets of the training split, (N, H, W).
        classes: Number of classes; 1 for regression.
        epochs: Number of epochs.
        seed: Seed of the decoder's weights and of the order of samples.
        device: Device to run on.
        progress: Whether to show progress bars.

    Returns:
        Predicted maps of the test split.

    Raises:
        UnsuitableError: If the backbone or the data do not support the decoder.
    """
    lone = _lone_image(decoder, backbone, data)
    seed_everything(seed, verbose=False)
    task = _task(decoder, backbone, data, classes)
    # Values are standardised for training, and predictions are converted back.
    center, spread = 0.0, 1.0
    if data.task == 'regression':
        if not train_targets.isfinite().all():
            raise UnsuitableError(f'{data.name}: TorchGeo supports only maps without gaps')
        center, spread = train_targets.mean().item(), train_targets.std().clamp_min(1e-12).item()
    kind = torch.device(device)
    trainer = Trainer(
        accelerator='gpu' if kind.type == 'cuda' else kind.type,
        devices=[kind.index or 0] if kind.type == 'cuda' else 1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    # Batches are prepared on the CPU, in the workers of the data loaders.
    adapter = copy.deepcopy(backbone.adapter).cpu()
    adapter.multiple = math.lcm(adapter.multiple, _MULTIPLE)
    prepare = _prepare(adapter, data, center, spread)

    def loader(split: Split) -> DataLoader[Any]:
        return DataLoader(
            data.splits[split],
            batch_size=data.batch_size,
            shuffle=split == 'train',
            num_workers=data.num_workers,
            collate_fn=lambda samples: prepare(data.collate_fn(samples)),
            generator=torch.Generator().manual_seed(seed),
            drop_last=split == 'train' and lone,
        )

    with warnings.catch_warnings():
        # A frozen backbone is in evaluation mode on purpose.
        warnings.filterwarnings('ignore', '.*in eval mode at the start of training')
        # TorchGeo's schedule of the learning rate needs the validation loss.
        trainer.fit(task, loader('train'), loader('val'))
    text = escape(printable(f'{backbone.name}: maps')) if progress else None
    maps = _predict(task.eval().to(device), adapter.to(device), data, device, text)
    if data.task == 'regression':
        maps = maps * spread + center
    resized = [line for line in adapter.lines if line not in backbone.adapter.lines]
    return Prediction(decoder.name, '', maps, '; '.join([counted(epochs, 'epoch'), *resized]))


def _lone_image(decoder: Decoder, backbone: Backbone, data: LabelledData) -> bool:
    """Return whether the last training batch has one image, which UPerNet cannot be trained with.

    The batch normalisation of UPerNet's pyramid pooling needs several values per channel, but one
    image has a single pixel there.
    """
    if decoder.model != 'upernet':
        return False
    if min(data.size('train'), data.batch_size) < 2:
        raise UnsuitableError(
            f'{backbone.name}: UPerNet needs batches of at least 2 training images, because of its '
            'batch normalisation'
        )
    return data.size('train') % data.batch_size == 1


def _task(decoder: Decoder, backbone: Backbone, data: LabelledData, classes: int) -> Any:
    """Build TorchGeo's task by name, and replace the model of its encoder with the backbone."""
    if backbone.model is None or backbone.decoder_name is None:
        raise UnsuitableError(f'{backbone.name}: not a ViT that TorchGeo can build by name')
    name = backbone.decoder_name
    if decoder.model == 'upernet':
        if name not in smp.encoders.encoders:
            raise UnsuitableError(
                f"{backbone.name}: '{name}' is not an encoder of segmentation-models-pytorch"
            )
    else:
        _check_patch_size(backbone)
        name = f'tu-{name}'
    common: dict[str, Any] = {
        'model': decoder.model,
        'backbone': name,
        'weights': None,
        'in_channels': _default_channels(backbone),
        'lr': _TUNED_LR if decoder.tuned else _LR,
    }
    task: LightningModule
    if data.task == 'regression':
        task = PixelwiseRegression(**common)
    else:
        task = SemanticSegmentation(
            **common, num_classes=classes, ignore_index=data.ignore_index, loss='ce'
        )
    vit = _replace(task.model.encoder, backbone.model, backbone.name)
    # Other parts of the encoder, such as a feature pyramid, are always trained.
    vit.requires_grad_(decoder.tuned).train(decoder.tuned)
    return task


def _check_patch_size(backbone: Backbone) -> None:
    """Raise an error for patch sizes that DPT cannot rescale to strides of 4, 8, 16 and 32."""
    size = getattr(getattr(backbone.model, 'patch_embed', None), 'patch_size', None)
    size = getattr(backbone.model, 'patch_size', size)
    side = size[0] if isinstance(size, tuple) else size
    if side is not None and side & (side - 1):
        raise UnsuitableError(
            f'{backbone.name}: DPT needs a patch size that is a power of two, such as 8 or 16 px, '
            f'not {side}; UPerNet and the linear head support any'
        )


def _default_channels(backbone: Backbone) -> int:
    """Return the number of channels with which the model can be built by name."""
    config: Any = getattr(backbone.model, 'pretrained_cfg', None) or {}
    return int(config['input_size'][0]) if 'input_size' in config else len(backbone.adapter.bands)


def _replace(encoder: nn.Module, backbone: nn.Module, title: str) -> nn.Module:
    """Replace the encoder's model of the same class with a copy of the backbone."""
    replacement = copy.deepcopy(backbone)
    for module in encoder.modules():
        for name, child in module.named_children():
            if type(child) is not type(backbone):
                continue
            for attribute in ('embed_dim', 'num_prefix_tokens'):
                if getattr(child, attribute, None) != getattr(backbone, attribute, None):
                    raise UnsuitableError(
                        f'{title}: its {attribute} differs from that of the model of its name'
                    )
            if len(child.feature_info) != len(backbone.feature_info):  # type: ignore[arg-type]
                raise UnsuitableError(f'{title}: its depth differs from the model of its name')
            setattr(module, name, replacement)
            return replacement
    raise UnsuitableError(f'{title}: the encoder has no {type(backbone).__name__}')


def _prepare(
    adapter: Adapter, data: LabelledData, center: float, spread: float
) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """Return a function that converts a batch to images and masks of equal size."""

    def prepare(batch: dict[str, Any]) -> dict[str, Tensor]:
        image = adapter(batch)['image']
        mask = data.targets(batch)
        if data.task == 'regression':
            mask = (mask - center) / spread
        if image.shape[-2:] != mask.shape[-2:]:
            resized = interpolate(mask[:, None].double(), image.shape[-2:], mode='nearest-exact')
            mask = resized[:, 0].to(mask.dtype)
        return {'image': image, 'mask': mask}

    return prepare


@torch.inference_mode()
def _predict(
    task: Any, adapter: Adapter, data: LabelledData, device: str, description: str | None
) -> Tensor:
    maps = []
    loader = track(data.loader('test'), description or '', disable=description is None)
    for batch in loader:
        size = batch['image'].shape[-2:]
        tensors = tensors_to(batch, device)
        outputs = interpolate(task(adapter(tensors)['image']), size, mode='bilinear')
        found = outputs[:, 0] if data.task == 'regression' else outputs.argmax(dim=1)
        maps.append(found.float().cpu() if data.task == 'regression' else found.cpu())
    return torch.cat(maps)
