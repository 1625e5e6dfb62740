"""Which part of the work is this process's, where several share it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Part:
    """Every n-th item, from some item on.

    Attributes:
        number: Number of the part, from 0.
        count: Number of parts.
    """

    number: int
    count: int

    @classmethod
    def of(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Self:
        """The part that a process was given.

        Args:
            text: 'I/N', part I of N, from 0; None: as torchrun, a step of srun or an array of SLURM
                says, of which an array and one of the others may come together.
            environment: Variables of the environment.

        Returns:
            The part; all of the work if nothing says otherwise.

        Raises:
            ValueError: If the text is no part.
        """
        if text is not None:
            match = re.fullmatch(r'(\d+)/(\d+)', text)
            if match is None or not int(match[1]) < int(match[2]):
                raise ValueError(f"part '{text}' must be I/N, with I from 0 to N - 1, such as 0/4")
            return cls(int(match[1]), int(match[2]))

        def number(name: str, default: int) -> int:
            return int(environment.get(name) or default)

        # In the script of a job, outside srun, there is one process, whatever SLURM_NTASKS says.
        rank, ranks = number('SLURM_PROCID', 0), number('SLURM_STEP_NUM_TASKS', 1)
        if 'WORLD_SIZE' in environment:
            rank, ranks = number('RANK', 0), number('WORLD_SIZE', 1)
        first, step = number('SLURM_ARRAY_TASK_MIN', 0), number('SLURM_ARRAY_TASK_STEP', 1)
        job = (number('SLURM_ARRAY_TASK_ID', first) - first) // step
        jobs = number('SLURM_ARRAY_TASK_COUNT', 1)
        # A list of array indices, such as 3,7, has gaps.
        return cls(job % jobs * ranks + rank % ranks, jobs * ranks)

    @property
    def is_all(self) -> bool:
        """Whether it is all of the work."""
        return self.count == 1

    def items(self, length: int) -> range:
        """Numbers of the items of the part.

        Args:
            length: Number of all items.

        Returns:
            The numbers.
        """
        return range(self.number, length, self.count)


#: All of the work.
ALONE = Part(0, 1)


def own_device(device: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The device of a process that torchrun started beside others on its machine.

    Args:
        device: A device, such as 'cuda'.
        environment: Variables of the environment.

    Returns:
        The device with the number of the process on its machine, unless it has one already.
    """
    number = environment.get('LOCAL_RANK')
    if device in (None, 'cpu') or number is None or ':' in str(device):
        return device
    return f'{device}:{number}'
