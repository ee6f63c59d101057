"""What would H0 to H7 take at a batch of 4096, on 256 v5e chips and on 128 v4 chips?

    python -m experiments.plan_table [--match=halonet_h1] [--limit=1]

Plans the recipes of configs/imagenet.py (`main.py --mode=plan`), writes each into docs/plans.json
when it is finished, and all as a table into docs/plans.md. Nothing of it needs a TPU, but libtpu
(`make tpu-aot`). A plan that is there already is not made again, unless something that it depends
on has changed: the traced step, the topology, the versions of jax and libtpu, or what reads the
compiler's answer (after a change of the plan itself, delete docs/plans.json). So what was
interrupted goes on, one plan in minutes.

The batch is shared by all devices in groups of `model.bn_group`; on v5e:16x16 a device has 16
images, which are one group, instead of the recipe's 32.
"""

import hashlib
import importlib.metadata
import json
import re
import sys
import time

import jax
from absl import app, flags
from etils import epath

from configs import imagenet
from experiments.tpu_kernels import code_hash
from halonet import evaluate, tpu_kernels
from halonet.files import write_whole
from halonet.plan import Target, describe_data, plan, trace_step

ROOT = epath.Path(__file__).parent.parent
RECORD, TABLE = ROOT / "docs" / "plans.json", ROOT / "docs" / "plans.md"
BATCH = 4096
# topology: examples per group of batch-norm statistics
TOPOLOGIES = {"v5e:16x16": 16, "v4:4x4x8": 32}
# What reads of a compiled step how long it takes.
SOURCES = ("aot", "hlo", "tpu_kernels")

HEAD = """\
# Plans of H0 to H7

What training by `configs/imagenet.py` would take at a batch of 4,096 images, by estimate: the step
was compiled for slices of TPUs that were not there, and nothing of this was run. Made by
`python -m experiments.plan_table`, which goes on where it was interrupted; a row is
`python main.py --config=configs/imagenet.py:halonet_h1 --mode=plan --plan.topology=v4:4x4x8`. On
v5e:16x16 a device has 16 images, so that its rows have `--config.model.bn_group=16`. All figures
are in [plans.json](plans.json).

Memory is of a device (here a chip), in GiB, and of the limit that libtpu gives to programs; the
largest batch is in images a device. Steps that others timed took 0.78 to 0.91 of what is estimated
for them ([tpu_calibration.txt](tpu_calibration.txt)), and nobody has timed the fused kernels. Days
are those of 350 epochs, without evaluation. Cores make the images, on the host, of the kind of the
machine that planned; so is the time that planning took, of H3 to H5 beside other work.

| model | topology | fits | memory | largest | ms a step | images/s | MFU | all-reduce, MB | \
days | cores | planned in |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""

FLAGS = flags.FLAGS


def entries():
    """Yields (name, configuration, topology), the cheap ones first."""
    for variant in imagenet.VARIANTS:
        for topology, group in TOPOLOGIES.items():
            config = imagenet.get_config(variant)
            config.data.batch_size, config.model.bn_group = BATCH, group
            yield f"{variant} on {topology}", config, topology


def step_program(config, topology):
    """The training step as a text: two that are the same compile to the same."""
    target = Target.of(topology)
    mesh = evaluate.make_mesh(config, target.devices)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    images = config.data.batch_size // shares
    step, _ = trace_step(config, describe_data(config), target, shares, images)
    return re.sub(r"\b0x[0-9a-f]+", "", str(step.jaxpr))  # where a function lies in memory


def key_of(config, topology):
    """A hash of all that a plan depends on. Tracing the step takes seconds."""
    sources = (it for name in SOURCES for it in sorted((ROOT / "halonet").glob(f"{name}.py")))
    depends = {
        "program": hashlib.sha256(step_program(config, topology).encode()).hexdigest(),
        "topology": topology,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "sources": code_hash(sources),
        "kernels": tpu_kernels.RECORD.read_text(),
    }
    text = json.dumps(depends, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(record):
    """The table as Markdown."""
    versions = next((it["plan"]["versions"] for it in record.values()), {})
    missing = [name for name, _, _ in entries() if name not in record]
    rows = "\n".join(_row(it["plan"]) for it in record.values())
    missing = f"Not planned yet: {', '.join(missing)}.\n\n" if missing else ""
    of = ", ".join(f"{name} {versions[name]}" for name in ("jax", "libtpu") if name in versions)
    return f"{HEAD}{rows}\n\n{missing}{of}\n"


def _row(found):
    images, memory = found["images_per_device"], found["memory"]
    fits = "yes"
    if not found["fits"]:
        fits = f"no; {images['compiled']} of {images['wanted']} do"
    cells = [
        *(f"`{found['model']}`", found["topology"]["name"], fits),
        f"{memory['total'] / 2**30:.1f} of {memory['limit'] / 2**30:.2f}",
        str(found["largest_batch"]["images_per_device"]),
    ]
    if found["seconds"]:
        reduced = found["collectives"].get("all-reduce", {"bytes": 0})
        cells += [
            f"{1e3 * found['seconds']['estimate']:.0f}",
            f"{found['images_per_second']['estimate']:,.0f}",
            f"{100 * found['mfu']['estimate']:.1f} %",
            f"{reduced['bytes'] / 1e6:.0f}",
            f"{found['schedule']['days']['estimate']:.2f}",
            f"{found['input']['cores']:,.0f}",
        ]
    else:
        cells += ["-"] * 6
    cells.append(f"{found['plan_seconds']:.0f} s")
    return f"| {' | '.join(cells)} |"


def write(record):
    """Writes the record and its table."""
    write_whole(RECORD, json.dumps(record, indent=1) + "\n")
    write_whole(TABLE, render(record))


def define_flags():
    """Not on import: tests import this beside other command lines."""
    flags.DEFINE_string("match", "", "only the plans whose name contains this")
    flags.DEFINE_integer("limit", 0, "make so many plans at most; 0: all", lower_bound=0)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; all settings are flags")
    made = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    todo = [
        (name, config, topology)
        for name, config, topology in entries()
        if FLAGS.match in name
        and (name not in made or made[name]["key"] != key_of(config, topology))
    ]
    for number, (name, config, topology) in enumerate(todo[: FLAGS.limit or None], start=1):
        began = time.monotonic()
        print(f"{number}/{len(todo)} {name}", file=sys.stderr, flush=True)
        found = plan(config, topology=topology)
        made[name] = {"key": key_of(config, topology), "plan": found}
        made = {name: made[name] for name, _, _ in entries() if name in made}
        write(made)
        print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    write(made)
    print(render(made), end="")


if __name__ == "__main__":
    define_flags()
    app.run(main)
