"""Early warning of representation collapse."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightly.utils.dist import world_size
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.utilities.distributed import gather_all_tensors

from geofm.losses import reduced

#: Largest number of features gathered from several ranks. The singular value decomposition of more
#: is slow.
MAX_GATHERED = 1024


def feature_std(features: Tensor) -> Tensor:
    """Compute the spread of L2-normalised features, as in SimSiam (Chen and He, 2021).

    Args:
        features: Features of shape (N, D).

    Returns:
        Mean over dimensions of the standard deviation, times sqrt(D). It is 0 if all features are
        equal, and near 1 if they are spread over the sphere.
    """
    features = normalize(features.float(), dim=1)
    return features.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5


def effective_rank(features: Tensor) -> Tensor:
    """Compute the effective rank of centred features (Roy and Vetterli, 2007).

    Args:
        features: Features of shape (N, D).

    Returns:
        Exponential of the entropy of the normalised singular values. It is 0 if all features are
        equal, 1 if they lie on a line, and up to min(N, D) if they are spread evenly.
    """
    features = features.float()
    singular = torch.linalg.svdvals(features - features.mean(dim=0))
    total = singular.sum()
    if total <= torch.finfo(total.dtype).eps * features.abs().max() * len(features):
        return total.new_zeros(())
    return torch.special.entr(singular / total).sum().exp()


class CollapseWatch(Callback):
    """Callback that logs signs of representation collapse and warns of them.

    It logs, with the prefix ``collapse/``:

    * ``feature_std`` and ``effective_rank``: spread and effective rank of the CLS features of the
      backbone that is kept after training (with an EMA teacher: the teacher's).
    * ``target_entropy``: entropy of the teacher's targets, divided by log K for K prototypes. It is
      near 1 if the targets are uniform and so carry no information.
    * ``mean_target_entropy``: entropy of the mean target, divided by log K. It is near 0 if all
      images have the same target.

    Methods without such targets log the first two only. With several ranks, all values are of the
    whole batch; spread and rank use at most 1024 features.
    """

    def __init__(
        self,
        min_std: float = 0.05,
        min_rank: float = 2.0,
        max_entropy: float = 0.999,
        min_mean_entropy: float = 0.05,
        patience: int = 20,
        after_step: int = 500,
        every_n_steps: int = 1,
    ) -> None:
        """Initialize a new CollapseWatch instance.

        Args:
            min_std: Lower limit of ``feature_std``.
            min_rank: Lower limit of ``effective_rank``.
            max_entropy: Upper limit of ``target_entropy``.
            min_mean_entropy: Lower limit of ``mean_target_entropy``.
            patience: Number of consecutive measurements beyond a limit before a warning.
            after_step: First step at which the limits apply. With DINOv2's small layer scales, the
                features of new weights are nearly equal.
            every_n_steps: Number of optimiser steps between measurements.
        """
        self.limits = {
            'feature_std': (min_std, math.inf),
            'effective_rank': (min_rank, math.inf),
            'target_entropy': (-math.inf, max_entropy),
            'mean_target_entropy': (min_mean_entropy, math.inf),
        }
        self.patience = patience
        self.after_step = after_step
        self.every_n_steps = every_n_steps
        #: Number of consecutive measurements beyond each limit.
        self.streaks = dict.fromkeys(self.limits, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, log, and warn."""
        if trainer.global_step % self.every_n_steps:
            return
        measured = _of_all_ranks(outputs)
        pl_module.log_dict({f'collapse/{k}': v for k, v in measured.items()}, batch_size=1)
        for name, value in measured.items():
            lowest, highest = self.limits[name]
            healthy = lowest <= value <= highest or trainer.global_step < self.after_step
            self.streaks[name] = 0 if healthy else self.streaks[name] + 1
            if self.streaks[name] == self.patience:
                limit = f'below {lowest:g}' if value < lowest else f'above {highest:g}'
                rank_zero_warn(
                    f'the representation may be collapsing: {name} = {value:.3g} has been {limit} '
                    f'for {self.patience} measurements, at step {trainer.global_step}. Consider a '
                    'lower learning rate, a lower teacher temperature, or a larger batch'
                )


def _of_all_ranks(watched: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute the measures from the batch of all ranks.

    Args:
        watched: Tensors of this rank: ``features`` and, for methods with targets,
            ``target_entropy`` and ``mean_target``, see
            :meth:`geofm.tasks.PretrainingTask.compute_losses`.

    Returns:
        The measures by name.
    """
    ranks = world_size()
    features = watched['features']
    if ranks > 1:
        features = torch.cat(gather_all_tensors(features[: max(1, MAX_GATHERED // ranks)]))
    measured = {
        'feature_std': feature_std(features).item(),
        'effective_rank': effective_rank(features).item(),
    }
    if 'mean_target' not in watched:
        return measured
    targets = torch.cat([watched['target_entropy'][None], watched['mean_target']])
    # All ranks have the same number of images.
    entropy, mean_target = (reduced(targets) / ranks).split([1, len(targets) - 1])
    log_prototypes = math.log(len(mean_target))
    return measured | {
        'target_entropy': entropy.item() / log_prototypes,
        'mean_target_entropy': torch.special.entr(mean_target).sum().item() / log_prototypes,
    }
