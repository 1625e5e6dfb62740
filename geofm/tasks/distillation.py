"""Distillation of a frozen model into a student of any sensors and size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchgeo.datasets.utils import Sample

from geofm.tasks.pretraining import PretrainingTask
from geofm.tasks.teacher import Teacher


class Distillation(PretrainingTask):
    """A student learns the CLS and patch features of a frozen, pretrained model.

    The teacher sees the bands that it was trained on, such as red, green and blue; the student
    sees these and any others, of any sensors. :attr:`model` is the student's backbone. With
    ``sensor_dropout`` the student learns the teacher's features from each sensor alone, too.

    The same losses beside those of a self-supervised method: give that one a ``teacher``.

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
            n_local: Number of local crops; 0, as only the global ones are shown to the teacher.
            mask_probability: Fraction of the crops in which patches are masked in the student's
                input.
            kwargs: Arguments of :class:`~geofm.tasks.pretraining.PretrainingTask`.

        Raises:
            CheckpointError: If the teacher's file cannot be read or does not fit.
            BandError: If the student lacks a band of the teacher, or what normalises it is not
                known.
            ValueError: If the teacher cannot take images of that size, or *n_local* is not 0.
        """
        if n_local:
            raise ValueError(
                f'n_local is {n_local}, but the teacher sees no local crops: set it to 0'
            )
        super().__init__(
            teacher=teacher, n_local=n_local, mask_probability=mask_probability, **kwargs
        )

    def configure_losses(self) -> None:
        """The losses are those that the teacher brings."""
        self.loss_weights = {}

    def compute_losses(
        self, batch: Sample, values: Mapping[str, float] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of a batch.

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
