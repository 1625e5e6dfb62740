"""Masked word prediction: pretraining for small data and small machines."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
from lightly.utils.dist import world_size
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, DistributedSampler
from torchgeo.datasets.utils import Sample

from geofm.device import to_device
from geofm.losses import Targets, WordTargets, at_least_float32
from geofm.models import MaskedDecoder
from geofm.printing import counted
from geofm.sensors import sensor_channels
from geofm.tasks.pretraining import PretrainingTask
from geofm.transforms import N_GLOBAL, Crops

#: Most epochs of the training data that are read to learn the words.
_MOST_EPOCHS = 64


class MaskedWords(PretrainingTask):
    """Task that predicts the patch words of masked patches and of whole crops.

    The backbone sees a fraction of the patches of each global crop, with photometric augmentation.
    From its tokens, a small decoder predicts the patch words of other patches and of their
    surroundings. A linear layer predicts the words of the whole crop from CLS. The targets are
    computed from the crop without this augmentation. The words are learned from the training images
    at the start of a run, which takes seconds. There is no teacher, no queue and no collapse, so
    small batches work.

    Each sensor has its own words. With ``sensor_dropout``, the words of a missing sensor are
    predicted from the other sensors.

    The words are those of Coates and Ng (2011). As targets of masked patches they replace HOG in
    Wei et al., 2022, `MaskFeat <https://arxiv.org/abs/2112.09133>`_; as targets of images they
    follow Gidaris et al., 2020, `BoWNet <https://arxiv.org/abs/2002.12247>`_. The encoder skips
    masked patches, as in He et al., 2022, `MAE <https://arxiv.org/abs/2111.06377>`_.
    """

    targets: nn.ModuleDict

    def __init__(
        self,
        words: int = 400,
        word_size: int = 8,
        target_dim: int = 128,
        fit_images: int = 2048,
        visible: float = 0.25,
        predicted: float = 0.375,
        decoder_depth: int = 1,
        cls_weight: float = 0.5,
        predict_from_mean: bool = False,
        shared_targets: bool = False,
        global_scale: tuple[float, float] = (1.0, 1.0),
        n_local: int = 0,
        lr: float = 4e-3,
        warmup_epochs: float = 1,
        weight_decay: tuple[float, float] = (0.05, 0.05),
        betas: tuple[float, float] = (0.9, 0.95),
        layer_decay: float = 1.0,
        patch_embed_lr_mult: float = 1.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Initialize the task.

        Args:
            words: Number of patch words per sensor.
            word_size: Side of a word in pixels of a crop.
            target_dim: Length of a target: number of principal components of the words.
            fit_images: Number of training images from which the words are learned.
            visible: Fraction of the patches of a global crop that the backbone sees.
            predicted: Fraction of the patches of a global crop that the decoder predicts. They are
                among those that the backbone does not see.
            decoder_depth: Number of blocks of the decoder.
            cls_weight: Weight of the loss of whole crops.
            predict_from_mean: Whether to predict the words of a whole crop also from the mean of
                its visible patch tokens. In short runs this mean learns much faster than CLS.
            shared_targets: Whether both global crops predict the mean of their words. With two
                dates per image (``n_dates: 2`` of the data module), the features then depend less
                on season and clouds.
            global_scale: Range of the area of a global crop, as a fraction of the image.
            n_local: Number of local crops. The backbone sees all of their patches, and the words of
                the global crops are predicted from their CLS tokens.
            lr: Peak learning rate; for a batch of 1024 if ``scale_lr`` is set.
            warmup_epochs: Epochs of linear warm-up of the learning rate.
            weight_decay: Initial and final weight decay.
            betas: Coefficients of AdamW.
            layer_decay: Factor of the learning rate per block, from the last to the first.
            patch_embed_lr_mult: Factor of the learning rate of patch embeddings.
            drop_path_rate: Rate of stochastic depth in the backbone, equal for all blocks.
            **kwargs: See :class:`PretrainingTask`. ``mask_probability``, ``mask_ratio`` and
                ``one_sensor_masks`` have no effect, because *visible* determines the masks.

        Raises:
            ValueError: If the fractions leave no patch to see or to predict.
        """
        if not (0 < visible < 1 and 0 < predicted <= 1 - visible):
            raise ValueError(
                f'visible={visible:g} and predicted={predicted:g} must be positive fractions of '
                'the patches that sum to at most 1'
            )
        super().__init__(**kwargs)

    # -- networks and targets -------------------------------------------------------------------

    def configure_models(self) -> None:
        """Initialize the networks, the multi-crop transform, and targets without words."""
        super().configure_models()
        hparams = self.hparams
        self.multi_crop.anchor_size = self.multi_crop.global_size
        self.multi_crop.mask_probability = 0.0
        self.targets = nn.ModuleDict(
            {
                sensor: WordTargets(
                    len(channels), hparams['word_size'], hparams['words'], hparams['target_dim']
                )
                for sensor, channels in sensor_channels(self.model.bands).items()
            }
        )
        patches = self.multi_crop.grid[0] * self.multi_crop.grid[1]
        self._visible = max(1, round(hparams['visible'] * patches))
        self._predicted = min(
            max(1, round(hparams['predicted'] * patches)), patches - self._visible
        )
        if self._predicted < 1:
            raise ValueError(
                f'crops of {patches} patch(es) leave none to predict: increase global_size'
            )

    def build_heads(self) -> dict[str, nn.Module]:
        """Build the decoder of patches, and the layer that predicts the words of a crop from CLS.

        Returns:
            The heads by name.
        """
        dim = self.model.embed_dim
        out = self.hparams['target_dim'] * len(sensor_channels(self.model.bands))
        # Twice the width: for each patch, and for the patches around it.
        return {
            'decoder': MaskedDecoder(
                dim, 2 * out, self.hparams['decoder_depth'], max(1, dim // 64)
            ),
            'of_image': nn.Linear(dim, out),
        }

    def configure_losses(self) -> None:
        """Set the weights of the losses."""
        self.loss_weights = {'patch': 1.0, 'cls': self.hparams['cls_weight']}

    # -- start of a run -------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Learn the words from the training images, unless they have been loaded."""
        super().on_fit_start()
        if all(bool(target.fitted) for target in self.targets.values()):
            return
        batches = self._training_images()
        channels = sensor_channels(self.model.bands)
        for sensor in channels:
            target = cast(WordTargets, self.targets[sensor])
            of_sensor = [self._of_sensor(sensor, channels[sensor], batch) for batch in batches]
            target.cpu().fit([b for b in of_sensor if len(b['image'])], self.model.patch_size)
            target.to(self.device)
            if world_size() > 1:
                # The images differ between ranks, so all ranks take the words of rank 0.
                for value in target.state_dict().values():
                    torch.distributed.broadcast(value, 0)
        rank_zero_info(
            f'{counted(self.hparams["words"], "patch word")} per sensor, learned from '
            f'{counted(sum(len(batch["image"]) for batch in batches), "image")}'
        )

    def _training_images(self) -> list[dict[str, Any]]:
        """Load some training images of this rank, normalised, on the CPU."""
        trainer = self.trainer
        loader = cast(DataLoader[Sample], trainer.train_dataloader)
        count = -(-self.hparams['fit_images'] // (loader.batch_size or 1))
        batches = []
        # Each loader draws a seed; fork, so that the random numbers of training stay the same.
        with torch.random.fork_rng(devices=[]):
            for batch in islice(_epochs(loader), count):
                # This runs all hooks of the transfer, including normalisation.
                moved = trainer.strategy.batch_to_device(batch, self.device)
                kept = ('image', 'valid', 'present')
                batches.append({k: v.cpu() for k, v in moved.items() if k in kept})
        return [_one_date(batch) for batch in batches]

    def _of_sensor(
        self, sensor: str, channels: list[int], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Select the bands of a sensor, of the images in which it is present."""
        rows: Any = slice(None)
        if 'present' in batch:
            present = self.model.of_all_sensors(batch['present'])
            rows = present[:, self.model.sensors.index(sensor)]
        part = {'image': batch['image'][rows][:, channels]}
        return {**part, 'valid': batch['valid'][rows]} if 'valid' in batch else part

    # -- a step ---------------------------------------------------------------------------------

    def compute_losses(
        self, batch: Sample, values: Mapping[str, float] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the losses of a batch, see :meth:`PretrainingTask.compute_losses`.

        Args:
            batch: A batch of images.
            values: Not used.

        Returns:
            The losses ``patch`` and ``cls``: 1 minus the cosine similarity of prediction and
            target, averaged over sensors and over patches (``patch``) or crops (``cls``); and the
            CLS features of the global crops.
        """
        crops = self.multi_crop(batch)
        count, patches = crops.masks.shape
        order = to_device(torch.rand(count, patches).argsort(dim=1), self.device)
        visible = order[:, : self._visible]
        wanted = order[:, self._visible : self._visible + self._predicted]

        views = self.views(crops, torch.arange(visible.numel(), device=self.device))
        views[0] = replace(views[0], masks=None, visible=visible)
        tokens = self.model.forward_views(views)
        cls, seen = tokens[0].cls, tokens[0].patches.view(count, self._visible, -1)
        of_patches = self.heads['decoder'](cls, seen, visible, wanted, self.multi_crop.grid)
        whole = [view.cls for view in tokens]
        if self.hparams['predict_from_mean']:
            whole.append(seen.mean(dim=1))
        of_images = self.heads['of_image'](torch.cat(whole))
        losses = self._compare(crops, of_patches, of_images, wanted)
        return losses, {'features': cls.detach()}

    def _compare(
        self, crops: Crops, of_patches: Tensor, of_images: Tensor, wanted: Tensor
    ) -> dict[str, Tensor]:
        """Compute the losses of predictions, over the sensors that are present in the data."""
        assert crops.anchors is not None
        hparams = self.hparams
        channels = sensor_channels(self.model.bands)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {'patch': [], 'cls': []}
        shape = (len(channels), self.hparams['target_dim'])
        parts = zip(
            channels.items(),
            of_patches.unflatten(-1, (shape[0], 2, shape[1])).unbind(-3),
            of_images.unflatten(-1, shape).unbind(-2),
            strict=True,
        )
        for (sensor, bands), patches, images in parts:
            target: Targets = self.targets[sensor](
                crops.anchors[:, bands], crops.anchors_valid, self.model.patch_size
            )
            here = self._in_data(sensor, crops.global_present, len(crops.globals))
            crop = torch.arange(len(wanted), device=wanted.device)[:, None]
            known = target.known[crop, wanted] & here[:, None]
            distance = _distance(patches, target.patches[crop, wanted]).mean(dim=-1)
            found['patch'].append((distance, known))
            # A local crop predicts the mean of both global crops.
            of_both = target.image.view(N_GLOBAL, -1, shape[1]).mean(dim=0)
            of_crops = of_both.repeat(N_GLOBAL, 1) if hparams['shared_targets'] else target.image
            local = self._in_data(sensor, crops.local_present, len(crops.locals))
            wanted_images = [of_crops, of_both.repeat(self.multi_crop.n_local, 1)]
            present = [here, local]
            if hparams['predict_from_mean']:
                wanted_images.append(of_crops)
                present.append(here)
            distance = _distance(images, torch.cat(wanted_images))
            found['cls'].append((distance, torch.cat(present)))
        return {name: _weighted_mean(of_sensors) for name, of_sensors in found.items()}

    def _in_data(self, sensor: str, present: Tensor | None, crops: int) -> Tensor:
        """Return whether a sensor is present in the data of each crop, bool (B,)."""
        if present is None:
            return torch.ones(crops, dtype=torch.bool, device=self.device)
        return self.model.of_all_sensors(present)[:, self.model.sensors.index(sensor)]


def _epochs(loader: DataLoader[Sample]) -> Iterator[Sample]:
    """Yield the batches of several epochs, for data with few samples per epoch.

    Only one epoch is read without a distributed sampler, because further epochs may repeat the same
    samples.
    """
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler):
        yield from loader
        return
    for epoch in range(_MOST_EPOCHS):
        sampler.set_epoch(epoch)
        yield from loader


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute 1 minus the cosine similarity along the last dimension."""
    return 1 - cosine_similarity(at_least_float32(prediction), target, dim=-1)


def _weighted_mean(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the mean of the counted distances, without synchronising with the host."""
    total = sum((distance * counts).sum() for distance, counts in parts)
    number = sum(counts.sum() for _, counts in parts)
    return torch.as_tensor(total / torch.as_tensor(number).clamp_min(1))


def _one_date(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flatten images with k dates, (B, k, C, H, W), into B x k images."""
    image = batch['image']
    if image.ndim == 4:
        return batch
    flat = {key: value.flatten(0, 1) for key, value in batch.items() if key != 'present'}
    if (present := batch.get('present')) is not None:
        several = present if present.ndim == 3 else present[:, None].expand(-1, image.shape[1], -1)
        flat['present'] = several.flatten(0, 1)
    return flat
