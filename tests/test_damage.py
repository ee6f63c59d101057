"""The count of damaged images, an epoch at a time."""

import pytest

from halonet.data.damage import DamageCount
from halonet.data.errors import DataError


def test_each_epoch_may_have_as_many_as_the_limit():
    # Steps of 8 in epochs of 20: 0 to 2 begin in the first, 3 and 4 in the second.
    count = DamageCount(limit=3, batch_size=8, examples=20)
    for places in (1, 0, 2, 3, 0, 3):
        count.add(places)
    assert count.counted() == {"epoch": 3, "total": 9}
    count.add(0)  # the last to begin in the third
    count.add(0)
    assert count.counted() == {"epoch": 0, "total": 9}


def test_a_restart_has_no_allowance_of_its_own():
    places = (1, 0, 1, 3, 0, 2, 0, 2)  # the last one too many, in an epoch of 5 to 7
    for stop in range(len(places)):
        count = DamageCount(limit=3, batch_size=8, examples=20)
        for number in places[:stop]:
            count.add(number)
        count = DamageCount(
            limit=3, batch_size=8, examples=20, start_step=stop, before=count.counted()
        )
        for number in places[stop:-1]:
            count.add(number)
        with pytest.raises(DataError, match="^4 damaged images in epoch 3, by step 8, and"):
            count.add(places[-1])


@pytest.mark.parametrize(("limit", "places"), [(3, (1, 0, 2, 3, 1)), (0, (0, 0, 0, 0, 1))])
def test_one_more_ends_the_run(limit, places):
    count = DamageCount(limit=limit, batch_size=8, examples=20, start_step=100)
    for number in places[:-1]:
        count.add(number)
    message = (
        rf"^{limit + 1} damaged images in epoch 42, by step 105, and "
        rf"config.data.damaged_limit={limit}; the log names them$"
    )
    with pytest.raises(DataError, match=message):
        count.add(places[-1])
