"""Masked word prediction: pretraining for small data and small machines."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
from lightly.utils.dist import world_size
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader
from torchgeo.datasets.utils import Sample

from geofm.device import to_device
from geofm.losses.precision import at_least_float32
from geofm.losses.word_targets import Targets, WordTargets
from geofm.models.decoder import MaskedDecoder
from geofm.sensors import sensor_channels
from geofm.tasks.pretraining import PretrainingTask
from geofm.transforms import Crops
from geofm.transforms.multicrop import N_GLOBAL


class MaskedWords(PretrainingTask):
    """Predict which patch words lie where a crop is masked, and in the image as a whole.

    The backbone sees a fraction of the patches of each global crop, with photometry. From its
    tokens a decoder of one block predicts the patch words of other patches and of their
    surroundings, and a linear layer predicts from CLS those of the whole crop, all of the crop
    without photometry. The words are
    learned from the training images when a run starts, in seconds: there is no teacher, no queue
    and nothing that could collapse, so that small batches will do.

    Each sensor has words of its own. With ``sensor_dropout``, the words of a missing sensor are
    predicted from the others.

    The words are those of Coates and Ng (2011); as targets of masked patches they follow HOG in
    Wei et al., 2022, `MaskFeat <https://arxiv.org/abs/2112.09133>`_, and as targets of images
    Gidaris et al., 2020, `BoWNet <https://arxiv.org/abs/2002.12247>`_. Most patches are not
    seen at all, as in He et al., 2022, `MAE <https://arxiv.org/abs/2111.06377>`_.
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
            words: Number of patch words of each sensor.
            word_size: Side of the patches that are words, in pixels of a crop.
            target_dim: Length of a target: principal components of the words that are kept.
            fit_images: Number of training images that the words are learned from.
            visible: Fraction of the patches of a global crop that the backbone sees.
            predicted: Fraction that the decoder predicts, of the others.
            decoder_depth: Number of blocks of the decoder.
            cls_weight: Weight of the loss of whole crops.
            global_scale: Fraction of the image's area that a global crop covers.
            n_local: Number of local crops, all of whose patches the backbone sees; from their CLS
                tokens the words of the global crops are predicted.
            lr: Peak learning rate, of a batch of 1024 if it is scaled.
            warmup_epochs: Warm-up of the learning rate.
            weight_decay: First and final weight decay.
            betas: AdamW's coefficients.
            layer_decay: Factor of the learning rate from a block to the one below.
            patch_embed_lr_mult: Factor of the patch embedding's learning rate.
            drop_path_rate: Stochastic depth of the backbone, the same in all blocks.
            **kwargs: See :class:`PretrainingTask`. ``mask_probability``, ``mask_ratio`` and
                ``one_sensor_masks`` have no effect: *visible* says what is masked.

        Raises:
            ValueError: If the fractions leave no patch to see or to predict.
        """
        if not (0 < visible < 1 and 0 < predicted <= 1 - visible):
            raise ValueError(
                f'visible={visible:g} and predicted={predicted:g} must be positive fractions of '
                'the patches that sum to at most 1'
            )
        super().__init__(
            global_scale=global_scale,
            n_local=n_local,
            lr=lr,
            warmup_epochs=warmup_epochs,
            weight_decay=weight_decay,
            betas=betas,
            layer_decay=layer_decay,
            patch_embed_lr_mult=patch_embed_lr_mult,
            drop_path_rate=drop_path_rate,
            **kwargs,
        )

    # -- what is built --------------------------------------------------------------------------

    def configure_models(self) -> None:
        """Initialize the networks, the cropping, and the targets without words."""
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
            raise ValueError(f'crops of {patches} patch(es) have none to predict: see global_size')

    def build_heads(self) -> dict[str, nn.Module]:
        """Decoder of patches, and the layer that predicts the words of a crop from CLS."""
        dim = self.model.embed_dim
        out = self.hparams['target_dim'] * len(sensor_channels(self.model.bands))
        # Of a patch, and of the patches around it.
        return {
            'decoder': MaskedDecoder(
                dim, 2 * out, self.hparams['decoder_depth'], max(1, dim // 64)
            ),
            'of_image': nn.Linear(dim, out),
        }

    def configure_losses(self) -> None:
        """Set the weights of the losses."""
        self.loss_weights = {'patch': 1.0, 'cls': self.hparams['cls_weight']}

    # -- a run ----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Learn the words from the training images, unless they came with the weights."""
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
                # Each rank has other images.
                for value in target.state_dict().values():
                    torch.distributed.broadcast(value, 0)
        rank_zero_info(
            f'{self.hparams["words"]} patch words per sensor, learned from '
            f'{sum(len(batch["image"]) for batch in batches):,} images'
        )

    def _training_images(self) -> list[dict[str, Any]]:
        """Some training images of this rank, normalised, on the CPU."""
        trainer = self.trainer
        loader = cast(DataLoader[Sample], trainer.train_dataloader)
        count = -(-self.hparams['fit_images'] // (loader.batch_size or 1))
        batches = []
        # Loaders draw a seed each, which training must not notice.
        with torch.random.fork_rng(devices=[]):
            for batch in islice(loader, count):
                # Runs all hooks of the transfer, those that normalise among them.
                moved = trainer.strategy.batch_to_device(batch, self.device)
                kept = ('image', 'valid', 'present')
                batches.append({k: v.cpu() for k, v in moved.items() if k in kept})
        return [_one_date(batch) for batch in batches]

    def _of_sensor(
        self, sensor: str, channels: list[int], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bands of a sensor, of those images that have it."""
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
        """Losses of a batch, see :meth:`PretrainingTask.compute_losses`.

        Returns:
            ``patch`` and ``cls``, each 1 minus the cosine between prediction and target, averaged
            over patches (crops) and over the sensors that they have.
        """
        crops = self.multi_crop(batch)
        count, patches = crops.masks.shape
        order = to_device(torch.rand(count, patches).argsort(dim=1), self.device)
        visible = order[:, : self._visible]
        wanted = order[:, self._visible : self._visible + self._predicted]

        views = self.views(crops, torch.arange(visible.numel(), device=self.device))
        views[0] = replace(views[0], masks=None, visible=visible)
        tokens = self.model.forward_views(views)
        cls, seen = tokens[0]
        of_patches = self.heads['decoder'](
            cls, seen.view(count, self._visible, -1), visible, wanted, self.multi_crop.grid
        )
        of_images = self.heads['of_image'](torch.cat([view.cls for view in tokens]))
        losses = self._compare(crops, of_patches, of_images, wanted)
        return losses, {'features': cls.detach()}

    def _compare(
        self, crops: Crops, of_patches: Tensor, of_images: Tensor, wanted: Tensor
    ) -> dict[str, Tensor]:
        """Distance of predictions from targets, of the sensors that are in the data."""
        assert crops.anchors is not None
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
            # A local crop is to tell what both global ones show.
            of_both = target.image.view(N_GLOBAL, -1, shape[1]).mean(dim=0)
            wanted_images = torch.cat([target.image, of_both.repeat(self.multi_crop.n_local, 1)])
            local = self._in_data(sensor, crops.local_present, len(crops.locals))
            found['cls'].append((_distance(images, wanted_images), torch.cat([here, local])))
        return {name: _weighted_mean(of_sensors) for name, of_sensors in found.items()}

    def _in_data(self, sensor: str, present: Tensor | None, crops: int) -> Tensor:
        """Whether the data of each crop have a sensor, bool (B,)."""
        if present is None:
            return torch.ones(crops, dtype=torch.bool, device=self.device)
        return self.model.of_all_sensors(present)[:, self.model.sensors.index(sensor)]


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """1 minus the cosine of the last dimension."""
    return 1 - cosine_similarity(at_least_float32(prediction), target, dim=-1)


def _weighted_mean(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of distances over all that count, without making the host wait."""
    total = sum((distance * counts).sum() for distance, counts in parts)
    number = sum(counts.sum() for _, counts in parts)
    return torch.as_tensor(total / torch.as_tensor(number).clamp_min(1))


def _one_date(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images of several dates, (B, k, C, H, W), as so many images."""
    image = batch['image']
    if image.ndim == 4:
        return batch
    flat = {key: value.flatten(0, 1) for key, value in batch.items() if key != 'present'}
    if (present := batch.get('present')) is not None:
        several = present if present.ndim == 3 else present[:, None].expand(-1, image.shape[1], -1)
        flat['present'] = several.flatten(0, 1)
    return flat
