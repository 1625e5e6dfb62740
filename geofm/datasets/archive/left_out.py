"""What is left out of the samples of an archive, and why."""

from dataclasses import dataclass, field

from geofm.printing import warn


@dataclass
class LeftOut:
    """Number of samples or files that are left out, by reason.

    Attributes:
        counts: How many, for each reason that occurred.
        examples: The first file for each reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, count: int, example: str) -> None:
        """Note what is left out.

        Args:
            reason: What and why, after the number, e.g. 'samples without ...'.
            count: How many; with 0 nothing is noted.
            example: The first file.
        """
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples.setdefault(reason, example)

    def __len__(self) -> int:
        """Number of all that is left out."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """Counts and the first example of each reason."""
        return '; '.join(
            f'{count} {reason} (first: {self.examples[reason]})'
            for reason, count in self.counts.items()
        )

    def warn(self) -> None:
        """Report what is left out in one warning, if anything is."""
        if self.counts:
            warn(f'left out: {self}')
