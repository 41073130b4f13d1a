"""What travels between ranks in a step, counted by a process group that wraps gloo."""

import pytest

from bench import ranks


@pytest.fixture(scope="module", params=[2, 4])
def counted(request):
    world = request.param
    ways = ranks.measure_world(world, rounds=1, slots=512)
    return world, {way["name"]: way["received"] for way in ways}


def test_the_shuffle_moves_only_the_rows_a_rank_needs(counted):
    world, received = counted
    row = 4 * ranks.CHANNELS * ranks.PIXELS**2
    others = ranks.BATCH * (world - 1)
    assert received[ranks.OURS]["all_to_all"] <= 1.05 * others / world * row
    # The official scheme gathers all images, and the keys twice.
    keys = 4 * ranks.DIM * others
    assert received[ranks.OFFICIAL]["all_gather"] == others * row + 2 * keys
    assert received[ranks.GATHERED]["all_gather"] == others * row + keys


def test_one_gathering_of_keys_and_no_broadcast_of_the_queue(counted):
    world, received = counted
    assert received[ranks.OURS]["all_gather"] == 4 * ranks.DIM * ranks.BATCH * (world - 1)
    # DistributedDataParallel broadcasts the statistics of batch norm in both; the official scheme the queue
    # (and its pointer, and the order of the images) besides.
    queue = 4 * ranks.DIM * 512 + 8 + 8 * world * ranks.BATCH
    others = (world - 1) / world  # all but rank 0
    assert received[ranks.OFFICIAL]["broadcast"] - received[ranks.OURS]["broadcast"] == queue * others
