"""What does a training step cost on a TPU, and where do its cycles go?

    python -m experiments.tpu_cost --model=halonet_h0 --image_size=256 --batch=16 \\
        --topology=v5e:2x2 [--implementation=xla_packed] [--out=FILE.json]
    python -m experiments.tpu_cost --calibrate [--match=v3]     # writes docs/tpu_calibration.txt

Compiles the training step of `halonet.steps` for the chip and runs nothing, so any machine will do;
it takes minutes. Reported for one device (of a v4: one core): memory; cycles, XLA's estimate and
the instructions of the fused kernels (from halonet/tpu_kernels.json); the time, each operation
bound by its cycles or by its bytes; collectives; and the dearest operations, grouped by the part of
the network that they come from.

No estimate is a measurement. `--calibrate` compiles what others have timed on TPUs and records the
ratio of their time to ours; the record is printed beside every estimate.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from halonet import aot, hlo, sharding, steps, tpu_kernels
from halonet.models import VARIANTS, create_model
from halonet.models.cost import cost
from halonet.optim import make_optimizer
from halonet.tpu_kernels import attention_layers

FLAGS = flags.FLAGS

DOCS = pathlib.Path(__file__).parent.parent / "docs"
RECORD = DOCS / "tpu_calibration.txt"


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training step."""

    model: str
    image_size: int
    batch: int
    topology: str
    implementation: str = "pallas_tpu"
    one: bool = True
    bn_group: int = 0
    optimizer: str = "sgd"


@dataclasses.dataclass(frozen=True)
class Published:
    """A step that somebody has timed on TPUs.

    Attributes:
      setup: ours that comes nearest.
      seconds: of their step.
      source: where the figure is, and what differs.
    """

    setup: Setup
    seconds: float
    source: str


PUBLISHED = {
    "flax ImageNet, TPU v3-8": Published(
        Setup("resnet50", 224, 128, "v3:2x2"),
        4.4 * 3600 / 125_100,
        "github.com/google/flax examples/imagenet/README.md: 125,100 steps in 4.4 h, batch 1024 on "
        "8 cores in bfloat16; start-up, input and evaluation included",
    ),
    "MLPerf 0.6 code, TPU v3-512": Published(
        Setup("resnet50", 224, 64, "v3:2x2"),
        32_768 / 480_000,
        "threadreaderapp.com/thread/1223395022814339073.html: 480,000 images/s, batch 32,768 on "
        "512 cores, Google's TensorFlow code with LARS; collectives included",
    ),
    "flax ImageNet, TPU v2-32": Published(
        Setup("resnet50", 224, 32, "v2:2x2"),
        2.5 * 3600 / 125_100,
        "github.com/google/flax examples/imagenet/README.md: 125,100 steps in 2.5 h, batch 1024 on "
        "32 cores in bfloat16; start-up, input and evaluation included",
    ),
}


def compile_step(setup: Setup) -> aot.Program:
    """Compiles a training step for one device of a topology or for all of them.

    Raises:
      ValueError: for a model, a size or a topology that does not exist.
      ModuleNotFoundError: without libtpu.
    """
    devices = aot.topology(setup.topology, apart=True).devices
    model = create_model(
        setup.model,
        dtype=jnp.bfloat16,
        implementation=setup.implementation,
        bn_group=setup.bn_group,
    )
    schedule = optax.constant_schedule(0.1)
    tx = make_optimizer(
        setup.optimizer, learning_rate=schedule, momentum=0.9, weight_decay=1e-4, clip_norm=0.0
    )
    init = functools.partial(
        steps.init_state, init_fn=model.init, tx=tx, image_size=setup.image_size, ema=False
    )
    state = jax.eval_shape(init, jax.random.key(0))
    images = setup.batch * (1 if setup.one else len(devices))
    batch = {
        "image": jax.ShapeDtypeStruct((images, setup.image_size, setup.image_size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }
    step = functools.partial(
        steps.train_step,
        apply_fn=model.apply,
        tx=tx,
        learning_rate=schedule,
        mean=VARIANTS[setup.model].mean,
        std=VARIANTS[setup.model].std,
        label_smoothing=0.1,
        ema_decay=0.0,
    )
    if not setup.one:
        mesh = jax.make_mesh(
            (len(devices), 1), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2, devices=devices
        )
        step = sharding.seeing(mesh, step)
        state = placed(state, sharding.replicated(mesh))
        batch = placed(batch, sharding.batch_sharding(mesh))
    program = aot.compile_for(
        step, state, batch, topology_name=setup.topology, donate=0, apart=True
    )
    found = tuple(with_kernel_cycles(op, setup) for op in program.operations)
    return dataclasses.replace(program, operations=found)


def with_kernel_cycles(op: hlo.Operation, setup: Setup) -> hlo.Operation:
    """Takes the cycles of a fused kernel from their table: to have them dumped takes an hour."""
    model = create_model(setup.model)
    return tpu_kernels.with_kernel_cycles(
        op,
        layers={(s, n): shape for s, n, shape in attention_layers(model, setup.image_size)},
        images=setup.batch,
        generation=setup.topology.split(":")[0],
        chip=aot.chip_of(setup.topology, apart=True),
    )[0]


def placed(tree, where):
    """The abstract arrays of a tree with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def part_of(op_name: str) -> str:
    """The part of the network that an operation comes from, by the names of JAX and Flax."""
    name = op_name
    if re.search(r"/(\w*bn\d*|attention_bn)/", name):
        return "norm"
    if "attention/" in name:
        return "projections" if re.search(r"/(query|key|value|out)/", name) else "attention"
    if "reduce_window" in name or "select_and_scatter" in name:
        return "pool"
    if "stem_conv" in name:
        return "stem"
    if re.search(r"/(\w*conv\d*)/", name):
        return "convolutions"
    if "/head/" in name:
        return "head"
    if "HaloNet" in name:
        return "activations and sums"
    return "loss and optimizer" if name else "copies"


def profile(program: aot.Program) -> dict[str, dict[str, float]]:
    """Cycles by part of the network, forward and backward. A fusion counts where its root does."""
    parts = collections.defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for op in program.operations:
        way = "backward" if "transpose(" in op.op_name else "forward"
        parts[part_of(op.op_name)][way] += program.roofline_cycles(op)
    return dict(sorted(parts.items(), key=lambda item: -sum(item[1].values())))


def report(setup: Setup, program: aot.Program) -> dict:
    """All that is said about a step, as plain numbers."""
    model = create_model(setup.model)
    adds = sum(part.cost.total for part in cost(model, setup.image_size, setup.image_size))
    # The backward pass has two products for each of the forward pass.
    flops = 3 * 2 * adds * setup.batch
    memory, chip = program.memory, program.chip
    return {
        "setup": dataclasses.asdict(setup),
        "memory_mb": {
            "arguments": memory.argument_size_in_bytes / 1e6,
            "temporaries": memory.temp_size_in_bytes / 1e6,
            "outputs": memory.output_size_in_bytes / 1e6,
            "code": memory.generated_code_size_in_bytes / 1e6,
        },
        "million_cycles": {"xla": program.xla_cycles / 1e6, "kernels": program.kernel_cycles / 1e6},
        "gigabytes_moved": sum(op.bytes * op.times for op in program.operations) / 1e9,
        "milliseconds": 1e3 * program.seconds,
        "images_per_second": setup.batch / program.seconds,
        "model_teraflop": flops / 1e12,
        "mfu": flops / program.seconds / (1e12 * chip.teraflops / chip.devices),
        "collectives": {
            kind: {"count": count, "megabytes": size / 1e6}
            for kind, (count, size) in program.collectives.items()
        },
        "profile_million_cycles": {
            part: {way: cycles / 1e6 for way, cycles in ways.items()}
            for part, ways in profile(program).items()
        },
    }


def show(found: dict, program: aot.Program, top: int) -> None:
    """Prints a report."""
    cycles, memory, chip = found["million_cycles"], found["memory_mb"], program.chip
    print(", ".join(f"{key} {value}" for key, value in found["setup"].items()))
    print(f"of a device ({chip.devices} per chip), clock {chip.gigahertz:.2f} GHz:")
    print("  memory, MB    " + "  ".join(f"{k} {v:.0f}" for k, v in memory.items()))
    total = cycles["xla"] + cycles["kernels"]
    print(
        f"  cycles, M     {total:.1f}  (XLA {cycles['xla']:.1f}, kernels {cycles['kernels']:.1f})"
    )
    print(f"  moved, GB     {found['gigabytes_moved']:.2f}")
    for kind, it in found["collectives"].items():
        print(f"  {kind}: {it['count']} of {it['megabytes']:.1f} MB together, not in the time")
    print(
        f"  estimate      {found['milliseconds']:.2f} ms, "
        f"{found['images_per_second']:.0f} images/s, MFU {100 * found['mfu']:.1f} %"
    )
    for line in calibration():
        print(f"                {line}")
    print("\nmillion cycles by part        forward  backward")
    for part, ways in found["profile_million_cycles"].items():
        print(f"  {part:26s}{ways['forward']:9.2f}{ways['backward']:10.2f}")
    print("\n thousand cycles   times      MB  operation")
    dearest = sorted(program.operations, key=program.roofline_cycles, reverse=True)
    for op in dearest[:top]:
        k_cycles, size = program.roofline_cycles(op) / 1e3, op.bytes * op.times / 1e6
        print(f"{k_cycles:16.0f}{op.times:8d}{size:8.1f}  {op.kind} {op.name}: {op.op_name[-70:]}")


def calibration() -> list[str]:
    """The recorded errors: what was measured, as a multiple of this estimate."""
    if not RECORD.exists():
        return ["never compared with a measurement: run with --calibrate"]
    lines = RECORD.read_text().splitlines()
    return [line for line in lines if "x measured" in line]


def calibrate(match: str) -> None:
    """Compiles the published setups and writes the record."""
    chosen = {name: it for name, it in PUBLISHED.items() if match in name}
    if not chosen:
        raise app.UsageError(f"--match={match} is in no setup: {'; '.join(PUBLISHED)}")
    lines = [
        "# Steps that others have timed on TPUs, and what experiments.tpu_cost makes of them.",
        f"# python -m experiments.tpu_cost --calibrate{f' --match={match}' if match else ''}",
        f"# jax {jax.__version__}; milliseconds of a step; no input, no collectives in ours.",
    ]
    for name, published in chosen.items():
        program = compile_step(published.setup)
        ours, theirs = 1e3 * program.seconds, 1e3 * published.seconds
        lines.append(
            f"{theirs / ours:.2f} x measured = {theirs:.1f} ms over {ours:.1f} ms estimated: "
            f"{name}, {published.setup.model}, {published.setup.batch} images a core"
        )
        lines.append(f"#   {published.source}")
        print("\n".join(lines[-2:]), flush=True)
    RECORD.write_text("\n".join(lines) + "\n")


def define_flags():
    """Not on import: tests import this beside other command lines."""
    flags.DEFINE_string("model", "halonet_h0", "a registered model")
    flags.DEFINE_integer("image_size", 256, "pixels of the square images", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "images per device", lower_bound=1)
    flags.DEFINE_string("topology", "v5e:2x2", "a slice of TPUs, see halonet.aot.topology")
    flags.DEFINE_bool("one", True, "compile for one device of the topology; else for all of them")
    flags.DEFINE_string("implementation", "pallas_tpu", "of halo attention")
    flags.DEFINE_integer(
        "bn_group", 0, "examples per group of batch-norm statistics", lower_bound=0
    )
    flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adamw"], "sgd has momentum")
    flags.DEFINE_integer("top", 20, "operations to print, the dearest first", lower_bound=0)
    flags.DEFINE_string("out", "", "write the report to this file as JSON")
    flags.DEFINE_bool("calibrate", False, "compile what others have timed, and record the ratios")
    flags.DEFINE_string("match", "", "calibrate with the setups whose name contains this")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; all settings are flags")
    try:
        if FLAGS.calibrate:
            calibrate(FLAGS.match)
            return
        setup = Setup(
            **{field.name: FLAGS[field.name].value for field in dataclasses.fields(Setup)}
        )
        start = time.monotonic()
        program = compile_step(setup)
    except (ValueError, ModuleNotFoundError) as e:
        sys.exit(f"error: {e}")
    found = report(setup, program)
    show(found, program, FLAGS.top)
    print(f"\ncompiled in {time.monotonic() - start:.0f} s")
    if FLAGS.out:
        pathlib.Path(FLAGS.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
