import datetime

import torch
from hypothesis import given
from hypothesis import strategies as st

from geofm.models.dates import NO_DATE, DayOfYear, year_fraction

EPOCH = datetime.date(1970, 1, 1)


@given(st.dates(min_value=datetime.date(1900, 1, 1), max_value=datetime.date(2200, 12, 31)))
def test_year_fraction_is_that_of_the_calendar(date: datetime.date) -> None:
    start, end = datetime.date(date.year, 1, 1), datetime.date(date.year + 1, 1, 1)
    expected = (date - start).days / (end - start).days
    days = torch.tensor([(date - EPOCH).days])
    assert abs(year_fraction(days).item() - expected) < 1e-6


def test_day_of_year_knows_leap_years() -> None:
    def days(year: int) -> int:
        return (datetime.date(year, 12, 31) - EPOCH).days

    fractions = year_fraction(torch.tensor([days(2018), days(2020), days(1900)]))
    torch.testing.assert_close(fractions, torch.tensor([364 / 365, 365 / 366, 364 / 365]))


def test_encoding_is_the_same_a_year_later_and_close_over_new_year() -> None:
    encode = DayOfYear(dim=32)
    dates = [(2017, 5, 1), (2018, 5, 1), (2018, 12, 31), (2019, 1, 1), (2018, 7, 1)]
    days = torch.tensor([(datetime.date(*d) - EPOCH).days for d in dates])
    may, may_later, new_years_eve, new_year, july = encode(days)
    torch.testing.assert_close(may, may_later)
    over_new_year = (new_years_eve - new_year).norm()
    assert over_new_year < 0.2 * (new_year - july).norm()


def test_unknown_date_adds_nothing() -> None:
    encode = DayOfYear(dim=8)
    encoding = encode(torch.tensor([NO_DATE, 17_000]))
    assert not encoding[0].any()
    assert encoding[1].any()
