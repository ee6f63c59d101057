"""Programs compiled ahead of time for TPUs that are not there: their memory and their cycles.

libtpu compiles for a topology that is only named, so what a TPU would run can be read here without
one: XLA's own estimate of the cycles of every operation, and, after `dump_instructions()`, the
instructions (VLIW bundles) of every Pallas kernel, for which XLA has no estimate. Nothing is
executed.

    program = compile_for(jax.jit(f), jax.ShapeDtypeStruct((8, 128), jnp.bfloat16))
    program.cycles, program.kernels, program.memory.temp_size_in_bytes
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Where libtpu writes the instructions that it made; read and emptied after each compilation.
_DUMP = pathlib.Path(tempfile.mkdtemp(prefix="tpu_aot_"))
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
# A second process would otherwise wait for the first one's TPU, which neither has.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Or else the host is asked over the network what kind of TPU machine it is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
if not jax.config.jax_platforms:
    # Or else JAX would want to run on the TPU for which libtpu is installed.
    jax.config.update("jax_platforms", "cpu")


def dump_instructions() -> None:
    """Asks libtpu for the instructions of kernels, which makes a whole step several times slower.

    To be called before libtpu is loaded: it reads its settings once.
    """
    if str(_DUMP) in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return
    flags = (
        f"--xla_jf_dump_to={_DUMP}",
        "--xla_jf_dump_llo_text=true",
        # Final bundles only: the other 65 passes would be a gigabyte for a training step.
        "--xla_jf_dump_llo_pass_label_regex=final_bundles",
    )
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags])


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a generation of TPU can do.

    Attributes:
      teraflops: peak of a chip in bfloat16, 1e12 floating-point operations per second.
      bandwidth: of a chip's memory (HBM), 1e9 bytes per second.
      memory: of a chip, GiB.
      devices: of JAX per chip, as these topologies count: two where a core is a device.
      flops_per_cycle: of a chip: 2 * 128 * 128 for each matrix unit of each core.
      source: of the first three and of the number of matrix units.
      cores: of a device, which share out the images of a kernel.
    """

    teraflops: float
    bandwidth: float
    memory: float
    devices: int
    flops_per_cycle: int
    source: str
    cores: int = 1

    @property
    def gigahertz(self) -> float:
        """The clock at which the matrix units reach the peak; the pages do not state one."""
        return 1e3 * self.teraflops / self.flops_per_cycle


_UNIT = 2 * 128 * 128
_PAGES = "https://cloud.google.com/tpu/docs/"
CHIPS = {
    "v2": Chip(46, 700, 16, 2, 2 * 1 * _UNIT, _PAGES + "v2"),
    "v3": Chip(123, 900, 32, 2, 2 * 2 * _UNIT, _PAGES + "v3"),
    "v4": Chip(275, 1200, 32, 2, 2 * 4 * _UNIT, _PAGES + "v4"),
    "v5e": Chip(197, 819, 16, 1, 4 * _UNIT, _PAGES + "v5e"),
    "v5p": Chip(459, 2765, 95, 1, 2 * 4 * _UNIT, _PAGES + "v5p", cores=2),
    # The page says two units of 256 x 256. But XLA's estimate of a product of 8192 x 8192 matrices
    # has 369,000 operations a cycle, more than two could make; four it is.
    "v6e": Chip(918, 1638, 32, 1, 4 * 4 * _UNIT, _PAGES + "v6e"),
}


def chip_of(topology_name: str) -> Chip:
    """The chip of a topology such as "v5e:2x2".

    Raises:
      ValueError: for a generation that is not in `CHIPS`.
    """
    generation = topology_name.split(":")[0]
    if generation not in CHIPS:
        known = ", ".join(CHIPS)
        raise ValueError(f"topology {topology_name!r} is of no known TPU; there are: {known}")
    return CHIPS[generation]


@functools.cache
def topology(name: str) -> Any:
    """The description of a slice of TPUs, such as "v5e:2x2"; `.devices` has its devices.

    The smallest of v2, v3, v5e and v6e is 2x2, that of v4 and v5p 2x2x1.

    Raises:
      ValueError: for a generation or a shape that libtpu does not know.
      ModuleNotFoundError: where libtpu is not installed, naming what installs it.
    """
    chip_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU needs libtpu; `pip install -e .[tpu-aot]` installs it"
        )
    try:
        return topologies.get_topology_desc(name, platform="tpu")
    except jax.errors.JaxRuntimeError as e:
        raise ValueError(f"libtpu refuses the topology {name!r}: {str(e).splitlines()[0]}") from e


def compile_for(
    function: Callable, *arguments: Any, topology_name: str = "v5e:2x2", donate: Any = ()
) -> Program:
    """Compiles a function for a TPU.

    Args:
      function: what `jax.jit` takes, or what it has made.
      *arguments: trees of `jax.ShapeDtypeStruct` (or of anything with a shape and a dtype). Those
        without a sharding go to the topology's first device.
      topology_name: see `topology`.
      donate: `donate_argnums` of `jax.jit`.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler refuses, such as a program that does not fit
        into memory ("RESOURCE_EXHAUSTED") or a kernel that Mosaic cannot translate.
    """
    device = topology(topology_name).devices[0]
    one = SingleDeviceSharding(device)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or one
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    _empty_dump()
    # Pallas asks the default device what kind of TPU it lowers for.
    with jax.default_device(device):
        jitted = jax.jit(function, donate_argnums=donate)
        compiled = jitted.lower(*jax.tree.map(placed, arguments)).compile()
    hlo = compiled.as_text()
    dumped = str(_DUMP) in os.environ.get("LIBTPU_INIT_ARGS", "")
    kernels = _kernels(hlo) if dumped else {}
    found = tuple(operations(hlo, kernels))
    program = Program(compiled, chip_of(topology_name), found, kernels)
    _empty_dump()
    return program


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a compiled program, such as a fusion.

    Attributes:
      name, kind: its name and opcode in HLO; a Pallas kernel's kind is "kernel".
      times: how often it runs: the trips of the loops around it.
      cycles: XLA's estimate, or the bundles of a kernel if they were dumped, of one run; else 0.
      bytes: read from and written to HBM in one run, with the padding of tiles. Whole operands: of
        one that is only sliced this is too many.
      op_name: where it comes from, the path of JAX's names.
      shape: of what it makes, in HLO's words.
    """

    name: str
    kind: str
    times: int
    cycles: int
    bytes: int
    op_name: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for a device: a chip, or the core of a chip that shows its two apart."""

    compiled: Any
    chip: Chip
    operations: tuple[Operation, ...]
    kernels: dict[str, int]

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
        """Bundles of the Pallas kernels, one a cycle, loops times their trips."""
        return sum(op.cycles * op.times for op in self.operations if op.kind == "kernel")

    @property
    def cycles(self) -> int:
        return self.xla_cycles + self.kernel_cycles

    def roofline_cycles(self, op: Operation) -> float:
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
        found = collections.defaultdict(lambda: (0, 0))
        for op in self.operations:
            kind = op.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                count, total = found[kind]
                found[kind] = (count + op.times, total + op.times * _hbm_bytes(op.shape, True))
        return dict(found)


COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
# Instructions that neither compute nor move anything of their own.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
    *("conditional", "after-all", "partition-id", "replica-id", "opt-barrier"),
}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)(?= [\w\-]+\()|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0}


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry computation, and the lines of every computation."""
    computations, entry, lines = {}, "", []
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return entry, computations


def operations(hlo: str, kernels: dict[str, int]) -> Iterator[Operation]:
    """The instructions that run, those of loops with their number of trips."""
    entry, computations = _computations(hlo)

    def walk(computation: str, times: int) -> Iterator[Operation]:
        shapes = {}
        for line in computations[computation]:
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            name, shape, kind = found.groups()
            shapes[name] = shape
            if kind == "while":
                condition, body = re.search(
                    r"condition=%([\w.\-]+), body=%([\w.\-]+)", line
                ).groups()
                yield from walk(body, times * _trips(computations[condition], name))
            elif kind == "call":
                yield from walk(re.search(r"to_apply=%([\w.\-]+)", line)[1], times)
            elif kind == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                branches = (
                    branches[1]
                    if branches
                    else " ".join(
                        re.search(
                            r"true_computation=(%\S+), false_computation=(%\S+)", line
                        ).groups()
                    )
                )
                # All of them, though one runs: an upper bound.
                for branch in re.findall(r"%([\w.\-]+)", branches):
                    yield from walk(branch, times)
            if kind in _FREE or kind.endswith("-done"):
                continue
            if 'custom_call_target="tpu_custom_call"' in line:
                kind = "kernel"
            operands = re.findall(r"%([\w.\-]+)", _arguments(line[found.end() :]))
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            op_name = re.search(r'op_name="([^"]*)"', line)
            if kind.endswith("-start"):
                # It holds both ends: what moves is no more than the smaller one.
                ends = [_hbm_bytes(array[0], True) for array in re.finditer(_ARRAY, shape)]
                moved = min((size for size in ends if size > 8), default=0)
            else:
                moved = _hbm_bytes(shape)
                moved += sum(_hbm_bytes(shapes[it]) for it in operands if it in shapes)
            yield Operation(
                name=name,
                kind=kind,
                times=times,
                cycles=kernels.get(name, int(cycles[1]) if cycles else 0),
                bytes=moved,
                op_name=op_name[1] if op_name else "",
                shape=shape,
            )

    return walk(entry, 1)


def _arguments(rest: str) -> str:
    """What stands before the parenthesis that closes an instruction's operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return rest[:place]
    return rest


def _trips(condition: list[str], name: str) -> int:
    """How often a loop runs whose counter starts at zero and is compared with a constant."""
    bounds = [line for line in condition if re.search(r" = [su]32\[\]\S* constant\(", line)]
    compared = any("direction=LT" in line for line in condition)
    if len(bounds) != 1 or not compared:
        raise NotImplementedError(f"the loop {name} does not run a constant number of times")
    return int(re.search(r"constant\((\d+)\)", bounds[0])[1])


def _hbm_bytes(shape: str, everywhere: bool = False) -> int:
    """Bytes of the arrays of an HLO shape that lie in HBM, with the padding of their tiles."""
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        # S(1) and so on: the chip's own memory.
        if "S(" in layout and not everywhere:
            continue
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype.split("e")[0]) or 8)
        sizes = [int(d) for d in dims.split(",") if d]
        order = [int(d) for d in layout.split(":")[0].split(",") if d]
        tile = re.search(r":T\(([\d,]+)\)", layout)
        if tile and order and not everywhere:
            tile = [int(t) for t in tile[1].split(",")]
            for dim, unit in zip(order, reversed(tile), strict=False):
                sizes[dim] = -(-sizes[dim] // unit) * unit
        total += math.prod(sizes) * bits // 8
    return total


def _kernels(hlo: str) -> dict[str, int]:
    """The bundles of each Pallas kernel of the program that was compiled last, by its HLO name."""
    kernels, of_body = {}, {}
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = _INSTRUCTION.match(line)[1]
        body = re.search(r'"body":"([^"]*)"', line)[1]
        for file in _DUMP.glob("*-final_bundles.txt"):
            # TIME-NAME-NUMBER-final_bundles.txt
            written = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", file.name)
            if written and written[1] == name:
                of_body[body] = bundles(file.read_text())
        if body not in of_body:
            raise RuntimeError(
                f"libtpu wrote no instructions of the kernel {name}; was it loaded before "
                "dump_instructions()?"
            )
        kernels[name] = of_body[body]
    return kernels


def _empty_dump() -> None:
    for file in _DUMP.glob("*"):
        if file.is_file():
            file.unlink()


_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+([A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")
_EXIT = r"= scmp\.ge\.\S+ (?:\(\S+\), )?%(\w+), (\d+) /\* loop exit test"
_STEP = r"%(\w+) = sadd\.s32 (?:\(\S+\), )?(\d+), %(\w+)"
_START = r"%(\w+) = sphi %(\w+),"
_CONSTANT = r"%(\w+) = smov (?:\(\S+\), )?(\d+)\b"
_SPILL = r"= sst \[smem:\[#(\w+)\]\] (?:\(\S+\), )?%(\w+)"
_RELOAD = r"%(\w+) = sld \[smem:\[#(\w+)\]\]"


def bundles(text: str) -> int:
    """Cycles of a kernel from libtpu's dump of its final bundles: one each, and their delays.

    A bundle within loops counts once for each trip, and a kernel's grid is a loop. Both sides of a
    branch count. What the instructions wait for, memory above all, is not in it.

    Raises:
      NotImplementedError: for a loop whose trips depend on data.
    """
    constants, starts = dict(re.findall(_CONSTANT, text)), dict(re.findall(_START, text))
    spilled, reloads = collections.defaultdict(set), dict(re.findall(_RELOAD, text))
    for slot, register in re.findall(_SPILL, text):
        spilled[slot].add(register)

    def original(register: str) -> str:
        """The register whose value this one has by way of memory: where registers are too few."""
        while len(stored := spilled[reloads.get(register, "")]) == 1:
            (register,) = stored
        return register

    # Of the counters: the register at the head of the loop, their steps and where they start; zero
    # is not always written as a constant.
    counters = {}
    for new, step, old in re.findall(_STEP, text):
        head = original(old)
        start = original(starts.get(head, ""))
        counters[new] = head, int(step), int(constants.get(start, 0))
    # Of the loops around the bundle: cycles of one trip, trips, and the registers at the head.
    loops: list[list] = [[0, 1, ()]]

    def leave(depth: int) -> None:
        while len(loops) > depth + 1:
            cycles, trips, _ = loops.pop()
            if trips is None:
                raise NotImplementedError("a loop of the kernel has no constant number of trips")
            loops[-1][0] += cycles * trips

    for mark, depth, content in _with_depth(text):
        leave(depth - 1 if mark == "LB" else depth)
        if mark == "LB":
            loops.append([0, None, [new for new, _ in re.findall(_START, content)]])
        for counter, bound in re.findall(_EXIT, content):
            head, step, start = counters.get(original(counter), ("", 0, 0))
            # An outer loop may test for its end in the body of an inner one.
            at = [n for n, loop in enumerate(loops) if head in loop[2]]
            if not at:
                raise NotImplementedError(f"no step is known of the kernel's counter {counter}")
            trips = -(-(int(bound) - start) // step)
            # The grid's loop has two more trips, to fill and to drain its pipeline; its body is
            # skipped in one of them each.
            loops[at[0]][1] = trips if at[0] > 1 else max(1, trips - 2)
        delay = re.search(r"\bvdelay (\d+)", content)
        loops[-1][0] += 1 + (int(delay[1]) if delay else 0)
    leave(0)
    return loops[0][0]


def _with_depth(text: str) -> list[tuple[str, int, str]]:
    """The mark of each bundle ("LB" at the head of a loop), how many loops it is in, its content.

    Instructions of an outer loop are scheduled among those of an inner one, in bundles that are
    marked as the outer one's, and a bundle without any instruction is marked as of none. Either is
    in each loop that has a bundle further down.
    """
    found, depth = [], 0
    for line in reversed(text.splitlines()):
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue
        mark, content = bundle[1], bundle[3]
        depth = max(depth, len(bundle[2]))
        found.append((mark, depth, content))
        if mark == "LB":
            depth = len(bundle[2]) - 1
    return found[::-1]
