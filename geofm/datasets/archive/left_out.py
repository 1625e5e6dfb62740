"""Samples and files that are left out of an archive, and the reasons."""

from dataclasses import dataclass, field

from geofm.printing import counted, warn


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
            reason: What is left out and why, starting with the noun that is counted, in the
                singular: 'sample without ...'.
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
        said = []
        for reason, count in self.counts.items():
            noun, _, why = reason.partition(' ')
            said.append(f'{counted(count, noun)} {why} (first: {self.examples[reason]})')
        return '; '.join(said)

    def warn(self) -> None:
        """Warn about what is left out, if there is anything."""
        if self.counts:
            warn(f'left out: {self}')
