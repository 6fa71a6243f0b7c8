"""What ranks tell one another while they wait, in groups too large for each to read all."""

import pytest

from hdet.replicas.notes import EVERY, READERS, Notes


class Store:
    """A process group's store, as far as notes need one; counts what is read."""

    def __init__(self):
        self.values, self.reads = {}, 0

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        self.reads += 1
        return all(key in self.values for key in keys)


def notes_of(store, count):
    return [Notes(store, range(count), me, lambda rank: f"rank {rank}") for me in range(count)]


@pytest.mark.parametrize("count", [2, 64, 65, 1000])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_that_is_elsewhere_is_named_by_those_that_read_it_and_then_by_all(count, place):
    store = Store()
    notes = notes_of(store, count)
    other = round(place * (count - 1))
    for me, own in enumerate(notes):
        own.leave("waits", "converge() at step 3" if me == other else "the end of the round at step 5")
    found = [own.obstacles("the end of the round at step 5") for me, own in enumerate(notes) if me != other]
    told = f"rank {other} is in converge() at step 3"
    assert told in found
    for me, own in enumerate(notes):  # those that have found it fail
        if me != other and own.obstacles("the end of the round at step 5"):
            own.leave("failed", "the end of the round at step 5")
    assert all(own.obstacles("the end of the round at step 5") for me, own in enumerate(notes) if me != other)


def test_readings_a_second_grow_with_the_ranks_and_not_with_their_square():
    rates = {}
    for count in (64, 1024, 4096):
        store = Store()
        notes = notes_of(store, count)
        for own in notes:
            own.others()
        rates[count] = store.reads / notes[0].every
    assert notes_of(Store(), 64)[0].every == EVERY
    assert rates[64] == 64 * 63 / EVERY
    assert rates[1024] < 2 * READERS * 1024 / (EVERY * 8) + 1
    assert rates[4096] < 1.1 * rates[1024]
