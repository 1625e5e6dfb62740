"""Detect losses and gradients that are not finite, with a check on the host every few batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from geofm.losses import reduced
from geofm.tasks.dumps import Step


@dataclass(slots=True, eq=False)
class SeenBatch:
    """Training batch since the last check.

    Attributes:
        step: Data to repeat the step.
        losses: Loss terms of the batch.
        norms: Gradient norms of the optimiser step after this batch; empty if there was no step.
    """

    step: Step
    losses: dict[str, Tensor]
    norms: dict[str, Tensor] = field(default_factory=dict)


class Finding(NamedTuple):
    """Result of a check.

    Attributes:
        failed: First batch since the last check that failed on any rank; None: all are finite.
        what: Description of the value that is not finite.
        signal: Largest signal number of all ranks; 0 for none.
        loss: Loss of the last batch on this rank.
    """

    failed: SeenBatch | None
    what: str
    signal: int
    loss: float


class FiniteGuard:
    """Guard that keeps values that are not finite out of the weights, with infrequent host checks.

    Flags are kept on the device. Once a flag is set, :meth:`skip` makes the optimiser skip that
    step and all following ones. At the next check, the weights are therefore those from before the
    first failing step. The batches since the last check are kept until then.

    Attributes:
        every: Number of batches between checks.
    """

    def __init__(self, every: int = 1) -> None:
        """Initialize a new FiniteGuard instance.

        Args:
            every: Number of batches between checks.
        """
        self.every = every
        self.forget()

    def forget(self) -> None:
        """Forget the batches since the last check."""
        self._seen: list[SeenBatch] = []
        #: Flags for loss and gradient: 1 / (1 + i) where i is the index in _seen of the first batch
        #: that failed, so that the earliest batch of all ranks has the largest value; 0 for none.
        self._first: list[Tensor] = []
        self._agreed: Tensor | None = None

    @property
    def is_due(self) -> bool:
        """Whether a check is due."""
        return len(self._seen) >= self.every

    def see(self, step: Step, losses: Mapping[str, Tensor], loss: Tensor) -> None:
        """Record a batch and its loss.

        Args:
            step: Data to repeat the step.
            losses: Loss terms of the batch.
            loss: Weighted sum of the terms.
        """
        self._seen.append(SeenBatch(step, {k: v.detach() for k, v in losses.items()}))
        self._loss = loss.detach()
        if not self._first:
            self._first = [self._loss.new_zeros(()) for _ in range(2)]
        self._mark(0, self._loss)

    def see_gradient(self, norms: dict[str, Tensor]) -> None:
        """Record the gradient of an optimiser step.

        Args:
            norms: Gradient norms by sub-network.
        """
        self._seen[-1].norms = norms
        self._mark(1, torch.stack([*norms.values()]))

    def _mark(self, which: int, values: Tensor) -> None:
        here = torch.where(values.isfinite().all(), 0.0, 1 / len(self._seen))
        self._first[which] = torch.maximum(self._first[which], here)

    def agree(self, signal: int) -> None:
        """Reduce the flags over the ranks, in one collective.

        Args:
            signal: Number of the signal that this rank received; 0 for none.
        """
        flags = [*self._first, self._first[0].new_full((), float(signal))]
        self._agreed = reduced(torch.stack(flags), dist.ReduceOp.MAX)
        self._first = list(self._agreed[:2].unbind())

    def skip(self) -> Tensor:
        """Return a scalar on the device: 1 if the optimiser must skip this step, otherwise 0."""
        return (torch.maximum(*self._first) > 0).to(torch.float32)

    def look(self) -> Finding | None:
        """Wait for the device, and read the flags that the ranks last exchanged.

        Returns:
            The result for the batches since :meth:`forget`; None if no flags were exchanged.
        """
        if self._agreed is None:
            return None
        flags = torch.cat([self._agreed, self._loss[None]]).tolist()
        bad_loss, bad_gradient, signal, loss = flags
        first = max(bad_loss, bad_gradient)
        if not first:
            return Finding(None, '', int(signal), loss)
        failed = self._seen[round(1 / first) - 1]
        if bad_gradient > bad_loss:
            return Finding(failed, 'gradient', int(signal), loss)
        own = not torch.stack([*failed.losses.values()]).isfinite().all()
        return Finding(failed, 'loss' if own else 'loss of another rank', int(signal), loss)
