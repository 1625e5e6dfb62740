"""Whether losses and gradients are finite, found on the device and looked at every few batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from geofm.losses.ranks import reduced
from geofm.tasks.dumps import Step


@dataclass(slots=True, eq=False)
class SeenBatch:
    """What is known of a training batch.

    Attributes:
        step: What it takes to do it again.
        losses: Its loss terms.
        norms: Norms of the gradient of the optimiser step that it ended; none if it ended none.
    """

    step: Step
    losses: dict[str, Tensor]
    norms: dict[str, Tensor] = field(default_factory=dict)


class Finding(NamedTuple):
    """What the host learns when it looks.

    Attributes:
        failed: The first batch since it last looked that failed on any rank; None: none did.
        what: What of it is not finite, in words.
        signal: The largest signal of all ranks, 0 if there is none.
        loss: Loss of the last batch, on this rank.
    """

    failed: SeenBatch | None
    what: str
    signal: int
    loss: float


class FiniteGuard:
    """Keeps numbers that are not finite out of the weights, though the host looks only at times.

    Flags stay on the device. Once one is set it stays set, and with :meth:`skip` the optimiser
    leaves out that step and all that follow: when the host looks, the weights are those that the
    first failing batch started from. The batches since it last looked are kept until then.

    Attributes:
        every: Batches from one look to the next.
    """

    def __init__(self, every: int = 1) -> None:
        """Initialize a new FiniteGuard instance.

        Args:
            every: Batches from one look to the next.
        """
        self.every = every
        self.forget()

    def forget(self) -> None:
        """Forget the batches seen, once the host has looked."""
        self._seen: list[SeenBatch] = []
        #: Of the first batch with a bad loss, and of that with a bad gradient: 1 / (1 + its place
        #: in _seen), so that the first of all ranks has the largest. 0: there is none.
        self._first: list[Tensor] = []
        self._agreed: Tensor | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is time to look."""
        return len(self._seen) >= self.every

    def see(self, step: Step, losses: Mapping[str, Tensor], loss: Tensor) -> None:
        """Take note of a batch.

        Args:
            step: What it takes to do it again.
            losses: Its loss terms.
            loss: Their weighted sum.
        """
        self._seen.append(SeenBatch(step, {k: v.detach() for k, v in losses.items()}))
        self._loss = loss.detach()
        if not self._first:
            self._first = [self._loss.new_zeros(()) for _ in range(2)]
        self._mark(0, self._loss)

    def see_gradient(self, norms: dict[str, Tensor]) -> None:
        """Take note of the gradient of an optimiser step.

        Args:
            norms: Its norms by sub-network.
        """
        self._seen[-1].norms = norms
        self._mark(1, torch.stack([*norms.values()]))

    def _mark(self, which: int, values: Tensor) -> None:
        here = torch.where(values.isfinite().all(), 0.0, 1 / len(self._seen))
        self._first[which] = torch.maximum(self._first[which], here)

    def agree(self, signal: int) -> None:
        """Reduce the flags over the ranks, in one collective.

        Args:
            signal: Number of the signal that this rank got, 0 if none.
        """
        flags = [*self._first, self._first[0].new_full((), float(signal))]
        self._agreed = reduced(torch.stack(flags), dist.ReduceOp.MAX)
        self._first = list(self._agreed[:2].unbind())

    def skip(self) -> Tensor:
        """Whether the optimiser is to leave out this step: 1 if so, else 0, as a scalar."""
        return (torch.maximum(*self._first) > 0).to(torch.float32)

    def look(self) -> Finding | None:
        """Wait for the device, and see what the ranks last agreed on.

        Returns:
            What is known of the batches since :meth:`forget`; None if there was no agreement.
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
