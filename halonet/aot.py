"""Programs compiled ahead of time for TPUs that are not there: their memory and their cycles.

libtpu compiles for a topology that is only named, so what a TPU would run can be read here without
one. Nothing is executed.

    program = compile_for(jax.jit(f), jax.ShapeDtypeStruct((8, 128), jnp.bfloat16))
    program.xla_cycles, program.memory.temp_size_in_bytes
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from halonet import hlo


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a generation of TPU can do.

    Attributes:
      teraflops: peak of a chip in bfloat16, 1e12 floating-point operations per second.
      bandwidth: of a chip's memory (HBM), 1e9 bytes per second.
      memory: of a chip, GiB.
      usable: of a device's memory, GiB: what libtpu's compiler gives to programs.
      links: of a chip to its neighbours, 1e9 bytes per second that all of them together send.
      devices: of JAX per chip: two where a core is a device.
      flops_per_cycle: of a chip: 2 * 128 * 128 for each matrix unit of each core.
      source: of the peak, the memory, the links and the number of matrix units.
      shapes: slices that there are, in chips.
      cores: of a device, which share out the images of a kernel.
    """

    teraflops: float
    bandwidth: float
    memory: float
    usable: float
    links: float
    devices: int
    flops_per_cycle: int
    source: str
    shapes: tuple[str, ...]
    cores: int = 1

    @property
    def gigahertz(self) -> float:
        """The clock at which the matrix units reach the peak; the pages do not state one."""
        return 1e3 * self.teraflops / self.flops_per_cycle


_UNIT = 2 * 128 * 128
_PAGES = "https://cloud.google.com/tpu/docs/"
_FLAT = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x12", "8x8x16", "8x16x16"),
)
# Links: half of the "bidirectional ICI bandwidth" of the pages of v5e, v5p and v6e; of the others,
# and of v5e and v6e alike, the "all-reduce bandwidth per Pod" by its chips.
CHIPS = {
    "v2": Chip(46, 700, 16, 7.48, 234, 2, 2 * 1 * _UNIT, _PAGES + "v2", _FLAT),
    "v3": Chip(
        *(123, 900, 32, 15.48, 332, 2, 2 * 2 * _UNIT, _PAGES + "v3", (*_FLAT, "16x32", "32x32"))
    ),
    "v4": Chip(
        *(275, 1200, 32, 30.75, 268, 1, 2 * 4 * _UNIT, _PAGES + "v4"),
        shapes=_CUBES,
        cores=2,
    ),
    "v5e": Chip(197, 819, 16, 15.75, 200, 1, 4 * _UNIT, _PAGES + "v5e", ("1x1", "2x4", *_FLAT)),
    "v5p": Chip(
        *(459, 2765, 95, 95.74, 600, 1, 2 * 4 * _UNIT, _PAGES + "v5p"),
        shapes=(*_CUBES, "16x16x16", "16x16x24"),
        cores=2,
    ),
    # The page says two units of 256 x 256. But XLA's estimate of a product of 8192 x 8192 matrices
    # has 369,000 operations a cycle, more than two could make; four it is.
    "v6e": Chip(
        918, 1638, 32, 31.25, 400, 1, 4 * 4 * _UNIT, _PAGES + "v6e", ("1x1", "2x4", *_FLAT)
    ),
}


def known_topologies(generation: str = "") -> str:
    """The slices of a generation of TPU, or of all, as a text for a message."""
    chosen = [generation] if generation in CHIPS else list(CHIPS)
    return "; ".join(f"{it}: {' '.join(sorted(CHIPS[it].shapes, key=_count))}" for it in chosen)


def _count(shape: str) -> tuple[int, str]:
    product = 1
    for side in shape.split("x"):
        product *= int(side)
    return product, shape


def chip_of(topology_name: str, apart: bool = False) -> Chip:
    """The chip of a topology such as "v5e:2x2".

    Args:
      apart: shows the two cores of a v4 as a device each, which v4 can do.

    Raises:
      ValueError: for a generation or a slice that is not in `CHIPS`.
    """
    generation, _, shape = topology_name.partition(":")
    if generation not in CHIPS or shape not in CHIPS[generation].shapes:
        known = known_topologies(generation)
        raise ValueError(f"topology {topology_name!r} is none that is known; there are {known}")
    chip = CHIPS[generation]
    if apart and generation == "v4":
        return dataclasses.replace(chip, devices=2, cores=1, usable=15.25)
    return chip


# What libtpu asks of a machine before it compiles.
_SETTINGS = {
    # A second process would otherwise wait for the first one's TPU, which neither has.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Or else the host is asked over the network what kind of TPU machine it is.
    "TPU_SKIP_MDS_QUERY": "1",
    # Or else it complains that it does not know; the topology that is compiled for is another.
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def topology(name: str, apart: bool = False) -> Any:
    """The description of a slice of TPUs, such as "v5e:2x2"; `.devices` has its devices.

    Args:
      apart: see `chip_of`.

    Raises:
      ValueError: for a generation or a slice that is not known.
      ModuleNotFoundError: where libtpu is not installed, naming what installs it.
    """
    chip = chip_of(name, apart)
    if not has_libtpu():
        raise ModuleNotFoundError(
            "compiling for a TPU needs libtpu: `make tpu-aot` or `pip install -e .[tpu-aot]` "
            "installs it"
        )
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    if not jax.config.jax_platforms:
        # Or else JAX would want to run on the TPU for which libtpu is installed.
        jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if name.startswith("v4:") and not apart:
        options["chip_config_name"] = "megacore"
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as e:
        raise ValueError(f"libtpu refuses the topology {name!r}: {str(e).splitlines()[0]}") from e
    assert len(found.devices) == _count(name.partition(":")[2])[0] * chip.devices, name
    return found


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """A context without the cache of programs: what is for a TPU comes back only where one is."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_for(
    function: Callable,
    *arguments: Any,
    topology_name: str = "v5e:2x2",
    donate: Any = (),
    apart: bool = False,
) -> Program:
    """Compiles a function for a TPU.

    Args:
      function: what `jax.jit` takes, or what it has made.
      *arguments: trees of `jax.ShapeDtypeStruct` (or of anything with a shape and a dtype). Those
        without a sharding go to the topology's first device.
      topology_name: see `topology`.
      donate: `donate_argnums` of `jax.jit`.
      apart: see `chip_of`.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler refuses, such as a program that does not fit
        into memory ("RESOURCE_EXHAUSTED") or a kernel that Mosaic cannot translate.
    """
    device = topology(topology_name, apart).devices[0]
    one = SingleDeviceSharding(device)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or one
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # Pallas asks the default device what kind of TPU it lowers for, and so does halo_attention.
    with jax.default_device(device), uncached():
        jitted = jax.jit(function, donate_argnums=donate)
        compiled = jitted.lower(*jax.tree.map(placed, arguments)).compile()
    found = tuple(hlo.operations(compiled.as_text()))
    return Program(compiled, chip_of(topology_name, apart), found)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for a device: a chip, or the core of a chip that shows its two apart."""

    compiled: Any
    chip: Chip
    operations: tuple[hlo.Operation, ...]

    @property
    def memory(self) -> Any:
        """Bytes of one device, `jax.stages.Compiled.memory_analysis()`."""
        return self.compiled.memory_analysis()

    @property
    def xla_cycles(self) -> int:
        """XLA's estimate for all but kernels, loops times their trips."""
        return sum(op.cycles * op.times for op in self.operations if op.kind != "kernel")

    @property
    def kernel_cycles(self) -> int:
        """Of the Pallas kernels, where somebody has filled them in, loops times their trips."""
        return sum(op.cycles * op.times for op in self.operations if op.kind == "kernel")

    @property
    def cycles(self) -> int:
        return self.xla_cycles + self.kernel_cycles

    def roofline_cycles(self, op: hlo.Operation) -> float:
        """Cycles of all runs of an operation: its own, or its bytes' over the bandwidth if more."""
        per_cycle = self.chip.bandwidth / self.chip.devices / self.chip.gigahertz
        return op.times * max(op.cycles, op.bytes / per_cycle)

    @property
    def seconds(self) -> float:
        """Of one run by estimate, every operation bound by its cycles or by its bytes."""
        cycles = sum(map(self.roofline_cycles, self.operations))
        return cycles / (1e9 * self.chip.gigahertz)

    @property
    def collectives(self) -> dict[str, tuple[int, int]]:
        """How many there are of each kind, and the bytes that they make on one device."""
        return {
            kind: (sum(times for times, _, _ in found), sum(made for _, made, _ in found))
            for kind, found in hlo.collectives(self.operations).items()
        }


def exchange_seconds(kind: str, made: int, group: int, topology_name: str) -> float:
    """Of collectives over the links between chips, were the links always busy and nothing hidden.

    Rings along each axis of the slice that is longer than one chip, in both directions at once
    where its ends are joined: on v5e and v6e along 16 chips, on v4 and v5p from 4x4x4 on, on v2 and
    v3 of whole pods. A device sends 2 (n - 1) / n times the bytes of an all-reduce, (n - 1) / n
    times those that an all-gather makes, and so on; no latency.

    Args:
      kind: one of `hlo.COLLECTIVES`.
      made: bytes that they make on one device.
      group: devices that take part in each; 0: all.
    """
    chip = chip_of(topology_name)
    sides = [int(side) for side in topology_name.partition(":")[2].split("x")]
    count = _count(topology_name.partition(":")[2])[0] * chip.devices
    n = group or count
    if n == 1:
        return 0.0
    joined = [_joined(topology_name.partition(":")[0], side, sides) for side in sides]
    per_link = 1e9 * chip.links / chip.devices / (2 * len(sides))
    links = sum((2 if ring else 1) for side, ring in zip(sides, joined, strict=True) if side > 1)
    share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1.0}
    sent = made * share.get(kind, (n - 1) / n)
    # A permutation goes from neighbour to neighbour, by one link.
    return sent / (per_link * (1 if kind == "collective-permute" else max(1, links)))


def _joined(generation: str, side: int, sides: list[int]) -> bool:
    """Whether the ends of an axis are joined, so that it is a ring."""
    if generation in ("v4", "v5p"):
        return all(it % 4 == 0 for it in sides)
    return side >= 16
