"""The job script that runs ``geofm fit`` under SLURM."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from geofm.printing import printable

#: Seconds before the time limit by which a job must have requeued itself, if there is time.
_RESERVE = 30

_BEFORE = """\
# Before the time limit, all ranks save a checkpoint together and end.
stop=
trap 'stop=1; kill -USR1 "$ranks"' USR1
"""

_AFTER = """\
ranks=$!
wait "$ranks"
code=$?
if [[ $stop ]]; then
    for ((second = 0; second < patience; second++)); do
        kill -0 "$ranks" 2> /dev/null || break
        sleep 1
    done
    kill -0 "$ranks" 2> /dev/null || { wait "$ranks"; code=$?; }
fi

# Unless the run has finished, the job requeues itself: always at the time limit, and a limited
# number of times after failures. If a failure cannot be written down, as on a full disk, the
# restarts of the job are counted instead.
if ((code == 0)); then
    exit 0
elif [[ $stop ]]; then
    echo "geofm: time limit: job $SLURM_JOB_ID is requeued"
    scontrol requeue "$SLURM_JOB_ID"
else
    if echo "$(date) exit code $code" >> "$failures"; then
        count=$(wc -l < "$failures")
    else
        count=$((${SLURM_RESTART_COUNT:-0} + 1))
    fi
    if ((count <= requeues)); then
        echo "geofm: exit code $code: job $SLURM_JOB_ID is requeued ($count of $requeues)"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "geofm: exit code $code: job $SLURM_JOB_ID has failed $count times and ends"
    fi
fi
exit "$code"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """SLURM job of a run, or job array of several runs.

    Attributes:
        arguments: Arguments of ``geofm fit``.
        runs: For a job array, further arguments of each run.
        options: Options of ``sbatch`` by name; None for options without a value.
        folder: Folder of the logs, an absolute path.
        requeues: Number of times that a failed job is requeued.
        grace: Seconds before the time limit at which the ranks are told to end.
    """

    arguments: Sequence[str]
    runs: Sequence[Sequence[str]]
    options: Mapping[str, str | None]
    folder: Path
    requeues: int
    grace: int

    def script(self, command: str) -> str:
        """Write the script.

        Args:
            command: The command that made the script, for a comment.

        Returns:
            The script for ``sbatch``.
        """
        name = '%A_%a' if self.runs else '%j'
        defaults = {
            'chdir': str(Path.cwd()),
            'output': f'{str(self.folder).replace("%", "%%")}/{name}.log',
            'open-mode': 'append',
            'signal': f'B:USR1@{self.grace}',
            'requeue': None,
            **({'array': f'0-{len(self.runs) - 1}'} if self.runs else {}),
        }
        options = {**defaults, **self.options}
        lines = ['#!/usr/bin/env bash', f'# {printable(command)}']
        lines += [
            f'#SBATCH --{option}' + ('' if value is None else f'={shlex.quote(value)}')
            for option, value in options.items()
        ]
        lines += [
            '',
            f'requeues={self.requeues}  # after failures',
            f'patience={self.grace - min(_RESERVE, self.grace // 2)}  # seconds to end',
            f'failures={shlex.quote(str(self.folder))}/$SLURM_JOB_ID.failures',
            '',
            *self._choice(),
            _BEFORE,
            self._srun(),
        ]
        return '\n'.join(lines) + '\n' + _AFTER

    def _choice(self) -> list[str]:
        """Return the lines that select the run of this job in the array."""
        if not self.runs:
            return []
        cases = [f'    {i}) run=({shlex.join(run)}) ;;' for i, run in enumerate(self.runs)]
        return ['case $SLURM_ARRAY_TASK_ID in', *cases, 'esac', '']

    def _srun(self) -> str:
        """Return the command that starts the ranks, with one option per line."""
        # Since SLURM 22.05, srun does not inherit this option from sbatch.
        cpus = self.options.get('cpus-per-task')
        srun = ['srun', '--kill-on-bad-exit=1', *([f'--cpus-per-task={cpus}'] if cpus else [])]
        lines = [srun, [sys.executable, '-m', 'geofm', 'fit']]
        for argument in self.arguments:
            if argument.startswith('--'):
                lines.append([])
            lines[-1].append(argument)
        text = ' \\\n    '.join(map(shlex.join, lines))
        return text + (' \\\n    "${run[@]}"' if self.runs else '') + ' &'
