"""Samples and files that are left out of an archive, and the reasons."""

from dataclasses import dataclass, field

from geofm.printing import warn


@dataclass
class LeftOut:
    """Number of samples or files that are left out, by reason.

    Attributes:
        counts: Number for each reason that occurred.
        examples: First file for each reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, count: int, example: str) -> None:
        """Record what is left out.

        Args:
            reason: What is left out and why, e.g. 'samples without ...'. It is printed after the
                number.
            count: The number. If it is 0, nothing is recorded.
            example: The first file.
        """
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples.setdefault(reason, example)

    def __len__(self) -> int:
        """Return the total number."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """Return count and first example of each reason."""
        return '; '.join(
            f'{count} {reason} (first: {self.examples[reason]})'
            for reason, count in self.counts.items()
        )

    def warn(self) -> None:
        """Warn about what is left out, if there is anything."""
        if self.counts:
            warn(f'left out: {self}')
