"""Distillation of a frozen model into a student with any sensors and size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchgeo.datasets.utils import Sample

from geofm.tasks.pretraining import PretrainingTask
from geofm.tasks.teacher import Teacher


class Distillation(PretrainingTask):
    """Task in which a student learns the CLS and patch features of a frozen, pretrained model.

    The teacher sees the bands that it was trained on, such as red, green and blue. The student sees
    these and any other bands of any sensors. :attr:`model` is the student's backbone. With
    ``sensor_dropout`` the student also learns the teacher's features from subsets of its sensors.

    To combine these losses with a self-supervised method, give that task a ``teacher`` instead.

    If you use this code for your research, please cite the original papers:

    * https://arxiv.org/abs/2312.06709 (AM-RADIO: CLS and patch features of foundation models)
    * https://arxiv.org/abs/2408.05088 (UNIC: the losses)
    """

    distills = True

    def __init__(
        self, teacher: Teacher, n_local: int = 0, mask_probability: float = 0.0, **kwargs: Any
    ) -> None:
        """Initialize the task.

        Args:
            teacher: The model whose features the student learns.
            n_local: Number of local crops. Must be 0, because the teacher sees global crops only.
            mask_probability: Fraction of the student's crops in which patches are masked.
            kwargs: Arguments of :class:`~geofm.tasks.PretrainingTask`.

        Raises:
            CheckpointError: If the teacher's file cannot be read or does not fit.
            BandError: If the student lacks a band of the teacher, or the normalisation of the
                teacher's input is unknown.
            ValueError: If the teacher does not support the image size, or *n_local* is not 0.
        """
        if n_local:
            raise ValueError(
                f'n_local is {n_local}, but the teacher sees no local crops: set n_local to 0'
            )
        super().__init__(teacher=teacher, **kwargs)

    def configure_losses(self) -> None:
        """Set no losses: those of the teacher come from :meth:`distill`."""
        self.loss_weights = {}

    def compute_losses(
        self, batch: Sample, values: Mapping[str, float] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the losses of a batch.

        Args:
            batch: See :meth:`PretrainingTask.compute_losses`.
            values: Values of the schedules; None outside of training.

        Returns:
            The losses by name, and the student's CLS features of shape (2B, D).
        """
        crops = self.multi_crop(batch)
        images, patches = crops.masks.shape
        every = torch.arange(crops.masks.numel(), device=self.device)
        (tokens,) = self.model.forward_views(self.views(crops, every))
        dense = tokens.patches.view(images, patches, -1)
        losses = self.distill(crops, tokens.cls, dense, learn=values is not None)
        return losses, {'features': tokens.cls.detach()}
