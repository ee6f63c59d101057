"""The instructions of Pallas kernels that were compiled ahead of time for TPUs: their cycles.

XLA has no estimate for a kernel, but libtpu writes down the instructions (VLIW bundles) that it
made, after `dump_instructions()`. `halonet.aot` does the rest.

    dump_instructions()
    program = compile_for(jax.jit(f), jax.ShapeDtypeStruct((8, 128), jnp.bfloat16))
    program.cycles
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from halonet import aot, hlo

# Where libtpu writes the instructions that it made; read and emptied after each compilation.
_DUMP = pathlib.Path(tempfile.mkdtemp(prefix="tpu_aot_"))
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)


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


def compile_for(function: Callable, *arguments: Any, **options: Any) -> aot.Program:
    """As `halonet.aot.compile_for`, with the cycles of the kernels where they were dumped."""
    _empty_dump()
    program = aot.compile_for(function, *arguments, **options)
    if str(_DUMP) in os.environ.get("LIBTPU_INIT_ARGS", ""):
        cycles = _kernels(program.compiled.as_text())
        found = tuple(
            dataclasses.replace(op, cycles=cycles.get(op.name, op.cycles))
            for op in program.operations
        )
        program = dataclasses.replace(program, operations=found)
    _empty_dump()
    return program


def _kernels(text: str) -> dict[str, int]:
    """The bundles of each Pallas kernel of the program that was compiled last, by its HLO name."""
    kernels, of_body = {}, {}
    for line in text.splitlines():
        if hlo.KERNEL not in line:
            continue
        name = hlo.INSTRUCTION.match(line)[1]
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
