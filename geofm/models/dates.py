"""Encoding of acquisition dates by the day of the year."""

import math

import torch
from torch import Tensor, nn

#: A missing date: ``np.datetime64('NaT')`` as int64.
NO_DATE = torch.iinfo(torch.int64).min


def _new_year(year: Tensor) -> Tensor:
    """Return the days from 1970-01-01 to 1 January of a year (Gregorian calendar)."""
    floor_div = lambda a, b: torch.div(a, b, rounding_mode='floor')  # noqa: E731
    leap_days = (
        floor_div(year - 1969, 4) - floor_div(year - 1901, 100) + floor_div(year - 1601, 400)
    )
    return 365 * (year - 1970) + leap_days


def year_fraction(days: Tensor) -> Tensor:
    """Compute the fraction of the year that has passed on a date.

    Args:
        days: Days since 1970-01-01, int64 of any shape.

    Returns:
        Values in [0, 1), float32 of the same shape: 0 on 1 January; 31 December is 364/365, or
        365/366 in a leap year.
    """
    year = 1970 + torch.div(days, 365.2425, rounding_mode='floor').long()
    # Near 1 January, the estimate may be wrong by one year.
    year = year - (days < _new_year(year)).long()
    year = year + (days >= _new_year(year + 1)).long()
    start, end = _new_year(year), _new_year(year + 1)
    return (days - start).float() / (end - start).float()


class DayOfYear(nn.Module):
    """Sinusoidal encoding of the day of the year.

    It projects the first harmonics of the annual cycle to the width of the tokens. Unlike the
    sinusoids of positions in a sequence (Vaswani et al., 2017), the harmonics are periodic: 31
    December is next to 1 January.

    Args:
        dim: Width of the tokens.
        harmonics: Number of harmonics. 1 is the annual cycle; 4 harmonics resolve about six weeks.
    """

    def __init__(self, dim: int, harmonics: int = 4) -> None:
        super().__init__()
        self.harmonics = harmonics
        self.proj = nn.Linear(2 * harmonics, dim, bias=False)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)

    def forward(self, days: Tensor) -> Tensor:
        """Encode dates.

        Args:
            days: Days since 1970-01-01, int64 of shape (B,); :data:`NO_DATE` where unknown.

        Returns:
            Encodings of shape (B, dim); zero where the date is unknown.
        """
        known = days != NO_DATE
        angle = 2 * math.pi * year_fraction(days.where(known, 0))
        waves = torch.arange(1, self.harmonics + 1, device=days.device) * angle[:, None]
        encoding = self.proj(
            torch.cat([waves.sin(), waves.cos()], dim=1).to(self.proj.weight.dtype)
        )
        return encoding * known[:, None]
