"""What a compiled program says of itself: XLA's text (HLO), read as a list of operations.

found = list(operations(compiled.as_text()))
sum(op.cycles * op.times for op in found)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

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
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)(?= [\w\-]+\()|\S+) ([\w\-]+)\(")
KERNEL = 'custom_call_target="tpu_custom_call"'
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a compiled program, such as a fusion.

    Attributes:
      name, kind: its name and opcode in HLO; a Pallas kernel's kind is "kernel".
      times: how often it runs: the trips of the loops around it.
      cycles: XLA's estimate of one run; 0 where it has none, as of kernels.
      bytes: read from and written to HBM in one run, with the padding of tiles. Whole operands: of
        one that is only sliced this is too many.
      op_name: where it comes from, the path of JAX's names.
      shape: of what it makes, in HLO's words.
      group: of a collective, how many devices take part in each of its exchanges; 0: all, or none.
    """

    name: str
    kind: str
    times: int
    cycles: int
    bytes: int
    op_name: str
    shape: str
    group: int = 0


def collectives(found: tuple[Operation, ...]) -> dict[str, list[tuple[int, int, int]]]:
    """Of each kind of collective: how often it runs, the bytes made on one device, and its group.

    The bytes are of all runs together; of arrays as they are, without the padding of tiles.
    """
    kinds: dict[str, list[tuple[int, int, int]]] = {}
    for op in found:
        kind = op.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        made = array_bytes(op.shape, padded=False)
        # What these start holds both ends.
        if op.kind == "collective-permute-start":
            made //= 2
        elif op.kind == "all-gather-start" and op.group:
            made = made * op.group // (op.group + 1)
        kinds.setdefault(kind, []).append((op.times, made * op.times, op.group))
    return kinds


def operations(hlo: str) -> Iterator[Operation]:
    """The instructions that run, those of loops with their number of trips.

    Raises:
      NotImplementedError: for a loop whose trips depend on data.
    """
    entry, computations = _computations(hlo)

    def walk(computation: str, times: int) -> Iterator[Operation]:
        shapes = {}
        for line in computations[computation]:
            found = INSTRUCTION.match(line)
            if not found:
                continue
            name, shape, kind = found.groups()
            shapes[name] = shape
            if kind == "while":
                condition, body = re.search(
                    r"condition=%([\w.\-]+), body=%([\w.\-]+)", line
                ).groups()
                yield from walk(body, times * _trips(line, computations[condition], name))
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
            if KERNEL in line:
                kind = "kernel"
            operands = re.findall(r"%([\w.\-]+)", _arguments(line[found.end() :]))
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            op_name = re.search(r'op_name="([^"]*)"', line)
            if kind.endswith("-start"):
                # It holds both ends: what moves is no more than the smaller one.
                ends = [array_bytes(array[0], padded=False) for array in re.finditer(_ARRAY, shape)]
                moved = min((size for size in ends if size > 8), default=0)
            else:
                moved = array_bytes(shape)
                moved += sum(array_bytes(shapes[it]) for it in operands if it in shapes)
            yield Operation(
                name=name,
                kind=kind,
                times=times,
                cycles=int(cycles[1]) if cycles else 0,
                bytes=moved,
                op_name=op_name[1] if op_name else "",
                shape=shape,
                group=_group(line),
            )

    return walk(entry, 1)


def array_bytes(shape: str, padded: bool = True) -> int:
    """Bytes of the arrays of an HLO shape.

    Args:
      padded: only of those that lie in HBM, with the padding of their tiles; else of all, as if
        there were no tiles.
    """
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        # S(1) and so on: the chip's own memory.
        if "S(" in layout and padded:
            continue
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype.split("e")[0]) or 8)
        sizes = [int(d) for d in dims.split(",") if d]
        order = [int(d) for d in layout.split(":")[0].split(",") if d]
        tile = re.search(r":T\(([\d,]+)\)", layout)
        if tile and order and padded:
            tile = [int(t) for t in tile[1].split(",")]
            for dim, unit in zip(order, reversed(tile), strict=False):
                sizes[dim] = -(-sizes[dim] // unit) * unit
        total += math.prod(sizes) * bits // 8
    return total


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


def _arguments(rest: str) -> str:
    """What stands before the parenthesis that closes an instruction's operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return rest[:place]
    return rest


def _group(line: str) -> int:
    """Devices in a group of a collective: replica_groups={{0,1},{2,3}} or =[2,2]<=[4]."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if listed:
        return listed[1].count(",") + 1
    return int(counted[1]) if counted else 0


def _trips(line: str, condition: list[str], name: str) -> int:
    """How often a loop runs whose counter starts at zero and is compared with a constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    if known:
        return int(known[1])
    bounds = [line for line in condition if re.search(r" = [su]32\[\]\S* constant\(", line)]
    compared = any("direction=LT" in line for line in condition)
    if len(bounds) != 1 or not compared:
        raise NotImplementedError(f"the loop {name} does not run a constant number of times")
    return int(re.search(r"constant\((\d+)\)", bounds[0])[1])
