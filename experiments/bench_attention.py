"""Which implementation of halo attention is fastest here, on the layers of H0 to H7?

    python -m experiments.bench_attention [--quick] [--out=FILE.json] [--batch=8] [--match=H1]

Prints, for each distinct layer shape, the time of the forward pass and of forward and backward
together, the compiled program's temporaries, and the times as ratios to xla_shift. Each time is the
median of runs that alternate between the implementations, so that a busy machine slows all alike.
The tiny shapes are those of a small network on 32-pixel digits.
"""

import collections
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.layer_shapes import gigabytes, layer_shapes
from halonet.ops import IMPLEMENTATIONS, halo_attention, table_size
from halonet.ops import measured as defaults_in_use

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "only the tiny shapes and H0, three runs of each")
flags.DEFINE_string("out", "", "write the results to this file as JSON")
flags.DEFINE_list("implementations", ["xla_shift", "xla_rows"], "names, in the order of the table")
flags.DEFINE_string("match", "", "only the shapes whose name contains this")
flags.DEFINE_integer("batch", 2, "images at a time; the tiny shapes take 64", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of all inputs")
flags.DEFINE_bool("write_defaults", False, "write halonet/ops/measured.py from what was measured")
flags.DEFINE_integer("runs", 5, "timed runs of each program", lower_bound=1)
flags.DEFINE_float("memory", 6.0, "GB that one program may take, by estimate", lower_bound=0.1)


def inputs(shape, n, dtype):
    """Random arguments of the op and a cotangent."""
    queries, table = shape.side // shape.stride, table_size(shape.block, shape.halo)
    sizes = [
        (n, queries, queries, shape.heads, shape.d_k),
        (n, shape.side, shape.side, shape.heads, shape.d_k),
        (n, shape.side, shape.side, shape.heads, shape.d_v),
        (table, shape.d_k),
        (table, shape.d_k),
        (n, queries, queries, shape.heads, shape.d_v),
    ]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return [jax.random.normal(k, size, dtype) for k, size in zip(keys, sizes, strict=True)]


def programs(shape, implementation, arguments, cotangent):
    """Compiles the forward pass, and forward and backward together."""
    op = functools.partial(
        halo_attention,
        block=shape.block,
        halo=shape.halo,
        stride=shape.stride,
        implementation=implementation,
    )

    def both(cotangent, *arguments):
        out, pull = jax.vjp(op, *arguments)
        return out, pull(cotangent)

    forward = jax.jit(op).lower(*arguments).compile()
    return forward, jax.jit(both).lower(cotangent, *arguments).compile()


def measure(shape, n, dtype, implementations, runs):
    """Returns one result for each implementation: milliseconds and megabytes."""
    *arguments, cotangent = inputs(shape, n, dtype)
    compiled = {name: programs(shape, name, arguments, cotangent) for name in implementations}
    times = {name: ([], []) for name in implementations}
    for run in range(runs + 1):
        for name, (forward, both) in compiled.items():
            for program, given, taken in (
                (forward, arguments, times[name][0]),
                (both, [cotangent, *arguments], times[name][1]),
            ):
                start = time.perf_counter()
                jax.block_until_ready(program(*given))
                if run > 0:  # the first warms up
                    taken.append(1e3 * (time.perf_counter() - start))
    return {
        name: {
            "forward_ms": statistics.median(times[name][0]),
            "both_ms": statistics.median(times[name][1]),
            "temporaries_mb": both.memory_analysis().temp_size_in_bytes / 1e6,
        }
        for name, (_, both) in compiled.items()
    }


def progress(text):
    """Shows what is being measured, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def defaults(results, platform):
    """The source of halonet/ops/measured.py: where xla_rows begins to pay, forward and backward."""
    layers = collections.defaultdict(dict)
    for row in results:
        blocks = (-(-row["side"] // row["block"])) ** 2
        pairs = (row["block"] // row["stride"]) ** 2 * (row["block"] + 2 * row["halo"]) ** 2
        logits = row["images"] * row["heads"] * blocks * pairs
        layers[logits, row["layer"]][row["implementation"]] = math.log(row["both_ms"])

    def total(least):
        return sum(
            times["xla_rows" if logits >= least else "xla_shift"]
            for (logits, _), times in layers.items()
        )

    least = min((0, *sorted(logits + 1 for logits, _ in layers)), key=total)
    forms = [(0, "xla_shift"), (least, "xla_rows")] if least else [(0, "xla_rows")]
    table = defaults_in_use.FASTEST | {platform: forms}
    lines = "".join(f'    "{name}": {forms!r},\n' for name, forms in table.items())
    text = pathlib.Path(defaults_in_use.__file__).read_text()
    return text[: text.index("FASTEST")] + f"FASTEST = {{\n{lines}}}\n".replace("'", '"')


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; all settings are flags")
    for name in FLAGS.implementations:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise app.UsageError(f"--implementations={name} is unknown; the known ones are {known}")
    runs = 3 if FLAGS.quick else FLAGS.runs
    dtype, device = jnp.dtype(FLAGS.dtype), jax.devices()[0]
    header = {
        "question": "which implementation of halo attention is fastest here, layer by layer?",
        "hardware": f"{device.platform}: {device.device_kind}, {os.cpu_count()} host cores, "
        f"{platform.machine()}",
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": FLAGS.dtype,
        "runs": runs,
    }
    for key, value in header.items():
        print(f"{key:10s} {value}")
    print("ratios are to xla_shift: below 1 is faster\n")
    columns = f"{'forward ms':>12s}{'ratio':>7s}{'fwd+bwd ms':>12s}{'ratio':>7s}{'temp MB':>9s}"
    print(f"{'layer':53s}{'images':>7s} {'implementation':14s}{columns}")

    shapes = {shape: name for shape, name in layer_shapes().items() if FLAGS.match in name}
    if FLAGS.quick:
        shapes = {s: name for s, name in shapes.items() if name.startswith(("TINY", "H0"))}
    results = []
    for i, (shape, name) in enumerate(shapes.items()):
        n = 64 if name.startswith("TINY") else FLAGS.batch
        needed = gigabytes(shape, n, dtype.itemsize)
        if needed > FLAGS.memory:
            print(f"{name:53s}{n:7d} skipped: needs about {needed:.1f} GB, --memory={FLAGS.memory}")
            continue
        progress(f"{i + 1}/{len(shapes)} {name}")
        measured = measure(shape, n, dtype, FLAGS.implementations, runs)
        progress("")
        base = measured.get("xla_shift")
        for implementation, result in measured.items():
            for time_of in ("forward", "both"):
                key = f"{time_of}_ms"
                result[f"{time_of}_ratio"] = base and result[key] / base[key]
            ratios = [
                "-" if r is None else f"{r:.2f}"
                for r in (result["forward_ratio"], result["both_ratio"])
            ]
            print(
                f"{name:53s}{n:7d} {implementation:14s}{result['forward_ms']:12.2f}{ratios[0]:>7s}"
                f"{result['both_ms']:12.2f}{ratios[1]:>7s}{result['temporaries_mb']:9.1f}",
                flush=True,
            )
            layer = {"layer": name, "images": n, **dataclasses.asdict(shape)}
            results.append({**layer, "implementation": implementation, **result})
    if FLAGS.write_defaults:
        source = defaults(results, device.platform)
        pathlib.Path(defaults_in_use.__file__).write_text(source)
    if FLAGS.out:
        with open(FLAGS.out, "w") as file:
            json.dump({**header, "results": results}, file, indent=1)


if __name__ == "__main__":
    app.run(main)
