from itertools import combinations

from geofm.sen12ms import REGIONS, ROIS, TEST_ROIS, VAL_ROIS, region_of, split_of

ALL = {(season, roi) for season, rois in ROIS.items() for roi in rois}


def test_counts_are_those_of_the_paper() -> None:
    assert len(ALL) == sum(map(len, ROIS.values())) == 53
    assert (len(VAL_ROIS), len(TEST_ROIS)) == (5, 13)


def test_splits_share_no_roi() -> None:
    assert not VAL_ROIS & TEST_ROIS
    assert VAL_ROIS | TEST_ROIS < ALL


def test_every_roi_lies_in_one_region() -> None:
    assert set().union(*REGIONS.values()) == ALL
    assert all(not a & b for a, b in combinations(REGIONS.values(), 2))


def test_errors_of_the_published_list_are_corrected() -> None:
    assert {('ROIs1970', 115), ('ROIs1970', 130)}.isdisjoint(ALL)
    assert {('ROIs2017', 115), ('ROIs2017', 130)} <= REGIONS['asiaWest']


def test_look_up() -> None:
    assert [split_of('ROIs2017', roi) for roi in (8, 22, 32)] == ['train', 'val', 'test']
    assert split_of('ROIs2017', 999) == 'train'
    assert region_of('ROIs2017', 32) == 'africa'
    assert region_of('ROIs2017', 999) is None
