import pytest

from geofm.maps.make.tables import Part, own_device


@pytest.mark.parametrize(
    ('environment', 'part'),
    [
        ({}, (0, 1)),
        ({'RANK': '2', 'WORLD_SIZE': '4'}, (2, 4)),
        ({'SLURM_PROCID': '1', 'SLURM_STEP_NUM_TASKS': '3', 'SLURM_NTASKS': '3'}, (1, 3)),
        # The batch script of a job is one process.
        ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '8'}, (0, 1)),
        (
            {
                'SLURM_ARRAY_TASK_ID': '5',
                'SLURM_ARRAY_TASK_MIN': '1',
                'SLURM_ARRAY_TASK_STEP': '2',
                'SLURM_ARRAY_TASK_COUNT': '4',
                'RANK': '1',
                'WORLD_SIZE': '2',
            },
            (5, 8),
        ),
    ],
)
def test_the_launcher_determines_the_part(
    environment: dict[str, str], part: tuple[int, int]
) -> None:
    assert Part.of(None, environment) == Part(*part)
    assert Part.of('1/3', environment) == Part(1, 3)


def test_parts_contain_each_item_once() -> None:
    shares = [list(Part(number, 3).items(8)) for number in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(8))
    for text in ('3/3', '1', '-1/2', '1/0'):
        with pytest.raises(ValueError, match='must be I/N'):
            Part.of(text)


def test_each_rank_has_a_device() -> None:
    assert own_device('cuda', {'LOCAL_RANK': '3'}) == 'cuda:3'
    for device in ('cpu', 'cuda:1', None):
        assert own_device(device, {'LOCAL_RANK': '3'}) == device
    assert own_device('cuda', {}) == 'cuda'
