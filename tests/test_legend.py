"""Legends from configurations and raster tags."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geofm.legend import Legend, LegendError, MapClass, palette_color


def test_names_count_from_zero() -> None:
    legend = Legend.of(['water', 'forest'])
    assert legend.values == (0, 1)
    assert legend.value('forest') == 1
    assert legend.name(1) == 'forest'
    assert legend.size == 2


def test_mapping_with_values_and_colors() -> None:
    legend = Legend.of({'town': {'value': 5, 'color': '#be343c'}, 'water': 2})
    assert legend.names == ('water', 'town')
    assert legend.size == 6
    assert legend.colors[5] == (190, 52, 60)


@pytest.mark.parametrize(
    'classes',
    [
        [],
        'water',
        ['a', 'a'],
        {'a': 1, 'b': 1},
        {'a': 255},
        {'a': -1},
        {'a': 'x'},
        {'a': {'color': 'red'}},
        {'a': {'colour': '#000000'}},
        {'\x1b[2J': 0},
    ],
)
def test_invalid_legends(classes: object) -> None:
    with pytest.raises(LegendError):
        Legend.of(classes)  # type: ignore[arg-type]


@given(
    st.dictionaries(
        st.integers(0, 254),
        st.tuples(*[st.integers(0, 255)] * 3),
        min_size=1,
        max_size=12,
    )
)
def test_tags_round_trip(colors: dict[int, tuple[int, int, int]]) -> None:
    legend = Legend(tuple(MapClass(v, f'class {v}', c) for v, c in colors.items()))
    assert Legend.from_tags(legend.tags()) == legend


@pytest.mark.parametrize('text', ['', '{', '[1]', '[{}]', '{}', '[]'])
def test_damaged_tag(text: str) -> None:
    with pytest.raises(LegendError):
        Legend.from_tags({'geofm_legend': text})


def test_palette_colors_differ() -> None:
    assert len({palette_color(i) for i in range(50)}) == 50
