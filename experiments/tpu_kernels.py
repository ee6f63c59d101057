"""What does the fused TPU kernel cost on every layer shape of H0 to H7?

    python -m experiments.tpu_kernels [--generations=v4,v5e,v5p,v6e] [--match="H1 stage 1"]
                                      [--out=halonet/tpu_kernels.json]

Compiles the kernel ahead of time, forward and backward, for one image in bfloat16 (no TPU is
needed, but libtpu: `pip install -e .[tpu-aot]`), and records its cycles by its instructions, XLA's
for what stands around it, and the temporaries in HBM. Shapes that the file holds already, of the
same kernel, are not compiled again, so that an interrupted table is gone on with. The table is
printed at the end, and written to docs/tpu_kernels.txt.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import tpu_aot
from experiments.layer_shapes import layer_shapes
from halonet.ops import halo_attention, table_size
from halonet.tpu_kernels import RECORD

TEXT = pathlib.Path(__file__).parent.parent / "docs" / "tpu_kernels.txt"
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SOURCES = ("pallas_tpu.py", "pallas_tpu_kernels.py")
COLUMNS = ("forward_cycles", "backward_cycles", "xla_cycles", "temporary_bytes")

FLAGS = flags.FLAGS


def cost(shape, generation):
    """Compiles one layer for one generation: `COLUMNS`, for one image."""
    tpu_aot.dump_instructions()
    queries, offsets = shape.side // shape.stride, table_size(shape.block, shape.halo)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q = array((1, queries, queries, shape.heads, shape.d_k))
    k = array((1, shape.side, shape.side, shape.heads, shape.d_k))
    v = array((1, shape.side, shape.side, shape.heads, shape.d_v))
    out = array((*q.shape[:-1], shape.d_v))
    table = array((offsets, shape.d_k))
    op = functools.partial(
        halo_attention,
        block=shape.block,
        halo=shape.halo,
        stride=shape.stride,
        # H7's maps are not of whole blocks.
        pad_to_blocks=True,
        implementation="pallas_tpu",
    )

    def both(d_out, *arguments):
        value, pull = jax.vjp(op, *arguments)
        return value, pull(d_out)

    # Of a v4 one core: the table was begun so.
    program = tpu_aot.compile_for(
        both, out, q, k, v, table, table, topology_name=TOPOLOGIES[generation], apart=True
    )
    cycles = {"forward": 0, "backward": 0}
    for operation in program.operations:
        if operation.kind == "kernel":
            pass_ = "forward" if "halo_attention_forward" in operation.name else "backward"
            cycles[pass_] += operation.times * operation.cycles
    return {
        "forward_cycles": cycles["forward"],
        "backward_cycles": cycles["backward"],
        "xla_cycles": program.xla_cycles,
        "temporary_bytes": program.memory.temp_size_in_bytes,
    }


def code_hash(paths):
    """Of the code of some modules, whatever their comments and docstrings say."""
    code = ""
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        code += ast.unparse(tree)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def kernel_hash():
    """Of the code of the kernel: what a table is of."""
    folder = pathlib.Path(sys.modules["halonet.ops"].__file__).parent
    return code_hash([folder / name for name in SOURCES])


def render(record):
    """The table as text."""
    layers = list(record["layers"])
    width = max(map(len, layers))
    lines = [
        "Thousands of cycles of the fused kernel for one image, forward + backward, and of XLA's",
        "operations around it; MB of temporaries. Compiled, not run: without waiting for memory.",
        f"jax {record['jax']}, libtpu {record['libtpu']}; python -m experiments.tpu_kernels",
        "",
        " " * width + "".join(f"{generation:>34}" for generation in TOPOLOGIES),
    ]
    for layer in layers:
        line = f"{layer:<{width}}"
        for generation in TOPOLOGIES:
            costs = record["layers"][layer].get(generation)
            if costs is None:
                line += f"{'-':>34}"
                continue
            forward, backward, xla = (costs[column] / 1e3 for column in COLUMNS[:3])
            line += f"{forward:>9,.1f} +{backward:>8,.1f} +{xla:>6,.1f}"
            line += f"{costs['temporary_bytes'] / 1e6:>7.2f}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def define_flags():
    """Not on import: tests import this beside other command lines."""
    flags.DEFINE_list("generations", list(TOPOLOGIES), "of TPUs to compile for")
    flags.DEFINE_string("match", "", "only the shapes whose name contains this")
    flags.DEFINE_string("out", str(RECORD), "file with the table, read and written")


def main(_):
    unknown = sorted(set(FLAGS.generations) - set(TOPOLOGIES))
    if unknown:
        sys.exit(f"error: no TPU generation {unknown[0]!r}; there are: {', '.join(TOPOLOGIES)}")
    out = pathlib.Path(FLAGS.out)
    versions = {
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "kernel": kernel_hash(),
    }
    record = json.loads(out.read_text()) if out.exists() else {}
    if {key: record.get(key) for key in versions} != versions:
        record = {**versions, "layers": {}}
    todo = [
        (name, shape, generation)
        for generation in FLAGS.generations
        for shape, name in layer_shapes().items()
        if FLAGS.match in name and generation not in record["layers"].get(name, {})
    ]
    for number, (name, shape, generation) in enumerate(todo, start=1):
        began = time.perf_counter()
        record["layers"].setdefault(name, {})[generation] = cost(shape, generation)
        out.write_text(json.dumps(record, indent=1) + "\n")
        seconds = time.perf_counter() - began
        print(f"{number}/{len(todo)} {generation} {name}: {seconds:.0f} s", file=sys.stderr)
    text = render(record)
    (TEXT if out == RECORD else out.with_suffix(".txt")).write_text(text)
    print(text, end="")


if __name__ == "__main__":
    define_flags()
    app.run(main)
