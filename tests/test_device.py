"""The hand-over to the devices: order, layout, read-ahead, waiting, and no shared buffers."""

import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from halonet.data import device


@pytest.fixture(scope="module")
def sharding():
    devices = np.array(jax.devices()).reshape(4, 2)
    assert devices.size == 8
    mesh = Mesh(devices, ("data", "fsdp"))
    return lambda ndim: NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch(number):
    return {
        "image": np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3) + np.uint8(number),
        "label": np.arange(16, dtype=np.int32) * number,
        "mask": np.arange(16) < number,
    }


def test_batches_arrive_whole_in_order_and_laid_out(sharding):
    batches = device.Prefetcher((batch(i) for i in range(7)), sharding)
    assert iter(batches) is batches
    for number, arrived in enumerate(batches):
        for name, expected in batch(number).items():
            assert isinstance(arrived[name], jax.Array)
            assert arrived[name].dtype == expected.dtype
            assert arrived[name].sharding.is_equivalent_to(sharding(expected.ndim), expected.ndim)
            np.testing.assert_array_equal(np.asarray(arrived[name]), expected)
            for shard in arrived[name].addressable_shards:
                assert shard.data.shape[0] == 2
                np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    assert number == 6
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_transfers_start_depth_batches_ahead(sharding, depth):
    asked = []
    batches = device.Prefetcher((asked.append(i) or batch(i) for i in range(8)), sharding, depth)
    assert asked == []  # nothing before the first is asked for
    for number in range(8):
        next(batches)
        assert len(asked) == min(number + depth, 8)


def test_depth_below_one_is_an_error(sharding):
    with pytest.raises(ValueError, match="depth=0 must be 1 or more"):
        device.Prefetcher(iter([]), sharding, 0)


def test_waiting_for_the_host_is_counted_and_nothing_else(sharding):
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield batch(i)

    batches = device.Prefetcher(slow(), sharding)
    assert batches.wait_seconds == 0
    next(batches)
    assert 0.1 <= batches.wait_seconds < 1
    before = batches.wait_seconds
    time.sleep(0.2)  # the consumer's own time
    assert batches.wait_seconds == before
    next(batches)
    assert batches.wait_seconds >= before + 0.05


def test_a_buffer_that_is_filled_again_is_an_error_not_a_wrong_image(sharding):
    def reusing():
        buffer = batch(0)
        while True:
            buffer["image"][:] = 7
            yield buffer

    batches = device.Prefetcher(reusing(), sharding, 1)
    first = next(batches)
    with pytest.raises(ValueError, match="read-only"):
        next(batches)
    np.testing.assert_array_equal(np.asarray(first["image"]), 7)


def test_an_error_of_the_host_reaches_the_consumer(sharding):
    def failing():
        yield batch(0)
        raise OSError("the disk is gone")

    batches = device.Prefetcher(failing(), sharding, 1)
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_close_closes_the_host_iterator_and_ends_the_iteration(sharding):
    closed = []

    def endless():
        try:
            while True:
                yield batch(0)
        finally:
            closed.append(True)

    batches = device.Prefetcher(endless(), sharding)
    next(batches)
    batches.close()
    assert closed == [True]
    with pytest.raises(StopIteration):
        next(batches)
    device.Prefetcher(iter([batch(0)]), sharding).close()  # a list's iterator has nothing to close
