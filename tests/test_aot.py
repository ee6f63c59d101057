"""What the compiler for absent TPUs says of programs and of slices. None is compiled here."""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from halonet import aot
from tests.test_hlo import TILED, operations


def test_sums_of_a_program():
    found = operations()
    found["halo.2"] = dataclasses.replace(found["halo.2"], cycles=1234)
    program = aot.Program(None, aot.CHIPS["v5e"], tuple(found.values()))
    assert program.xla_cycles == 5 + 11 * 70
    assert program.kernel_cycles == 1234
    assert program.collectives == {"all-reduce": (1, 80)}
    clock = 197e12 / (4 * 2 * 128 * 128)
    assert aot.CHIPS["v5e"].gigahertz == pytest.approx(clock / 1e9)
    # The loop waits for memory: 819 GB/s.
    in_loop = 11 * 2 * TILED / 819e9 * clock
    assert program.roofline_cycles(operations()["fusion.1"]) == pytest.approx(max(in_loop, 770))


def test_programs_for_absent_tpus_are_not_kept():
    """The cache of programs gives back none of them: reading one fails, with a warning."""
    before = jax.config.jax_enable_compilation_cache
    with aot.uncached():
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache == before


def test_unknown_topologies_are_refused():
    with pytest.raises(ValueError, match=r"'v9:2x2' is none that is known; there are v2: 2x2 4x4"):
        aot.topology("v9:2x2")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"`pip install -e \.\[tpu-aot\]` installs it"):
        aot.topology.__wrapped__("v5e:2x2")


@pytest.mark.parametrize("generation", aot.CHIPS)
def test_every_known_slice_is_of_a_known_chip(generation):
    for shape in aot.CHIPS[generation].shapes:
        assert aot.chip_of(f"{generation}:{shape}") == aot.CHIPS[generation]


def test_a_v4_is_one_device_or_two():
    together, apart = aot.chip_of("v4:2x2x1"), aot.chip_of("v4:2x2x1", apart=True)
    assert (together.devices, together.cores) == (1, 2)
    assert (apart.devices, apart.cores) == (2, 1)
    assert aot.chip_of("v5e:2x2", apart=True) == aot.CHIPS["v5e"]


@pytest.mark.parametrize(
    ("kind", "group", "topology", "seconds"),
    [
        # Of 200 GB/s by four links two are of use: no axis of 2x4 is a ring.
        ("all-reduce", 8, "v5e:2x4", 2 * 7 / 8 / 100),
        ("all-reduce", 0, "v5e:2x4", 2 * 7 / 8 / 100),
        ("all-reduce", 256, "v5e:16x16", 2 * 255 / 256 / 200),
        ("all-reduce", 128, "v4:4x4x8", 2 * 127 / 128 / 268),
        ("all-reduce", 4, "v4:2x2x1", 2 * 3 / 4 / (268 / 3)),
        ("all-gather", 8, "v5e:2x4", 7 / 8 / 100),
        ("reduce-scatter", 8, "v5e:2x4", 7 / 100),  # it makes an eighth of what goes in
        ("collective-permute", 0, "v5e:2x4", 1 / 50),
        ("all-reduce", 0, "v5e:1x1", 0),
    ],
)
def test_exchanges_take_as_long_as_their_bytes_on_the_links(kind, group, topology, seconds):
    found = aot.exchange_seconds(kind, 1_000_000_000, group, topology)
    assert found == pytest.approx(seconds)


@pytest.mark.middle
@pytest.mark.skipif(not aot.has_libtpu(), reason="needs the extra tpu-aot")
@pytest.mark.parametrize(
    ("topology", "apart"),
    [
        *(("v2:2x2", False), ("v3:2x2", False), ("v4:2x2x1", False), ("v4:2x2x1", True)),
        *(("v5e:1x1", False), ("v5e:16x16", False), ("v5p:2x2x1", False), ("v6e:2x2", False)),
    ],
)
def test_devices_and_their_memory_are_those_that_libtpu_has(topology, apart):
    chip, devices = aot.chip_of(topology, apart), aot.topology(topology, apart).devices
    assert len(devices) == chip.devices * math.prod(map(int, re.findall(r"\d+", topology)[1:]))
    huge = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"available HBM \({chip.usable}G\)"):
        aot.compile_for(lambda x: x @ jnp.sin(x), huge, topology_name=topology, apart=apart)
