"""What a run would need and how fast it would be, before it is paid for: `--mode=plan`.

The training step of a configuration is compiled for devices that need not be there, and what the
compiler says of it is put together. Nothing is run but a second of the input; every figure is an
estimate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from halonet import aot, files, hlo, recipe, runtime, sharding, tpu_kernels
from halonet import config as config_lib
from halonet import evaluate as evaluate_lib
from halonet.checkpoint import abstract_on
from halonet.config import ConfigError
from halonet.data import check
from halonet.data.errors import DataError
from halonet.fit import Trial, bytes_said, compile_sizes, largest
from halonet.models import HaloNet, cost
from halonet.plan_report import show

# What others measured of steps without our kernels, as a multiple of this estimate: from
# docs/tpu_calibration.txt, which `python -m experiments.tpu_cost --calibrate` writes.
MEASURED = (0.78, 0.91)
# Classes of data sets whose sizes `check.PUBLISHED` has.
CLASSES = {"imagenet2012": 1000}
# Batches on a device beside the one that the compiled step counts: those of a second step in
# flight, and of what is being transferred (`data.device.Prefetcher`).
WAITING = 3
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a plan is for.

    Attributes:
      name: such as "v5e:2x4" or "cpu:8".
      devices: of JAX; those of a TPU are only compiled for.
      chip: None on CPUs.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: aot.Chip | None

    @property
    def generation(self) -> str:
        return self.name.partition(":")[0]

    @property
    def limit(self) -> float:
        """Bytes of a device that programs and data may take; infinite where nobody says."""
        return self.chip.usable * GIB if self.chip else math.inf

    @classmethod
    def of(cls, name: str) -> Target:
        """The devices of "v5e:2x4" (in chips) or "cpu:8".

        Raises:
          ConfigError: for a name that is not known, listing those that are, and where libtpu is
            missing, saying what installs it.
        """
        # What is only compiled for must not be looked for in this machine.
        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")
        if found := re.fullmatch(r"cpu:([1-9]\d*)", name):
            return cls(name, _cpus(int(found[1])), None)
        try:
            chip = aot.chip_of(name)
            return cls(name, aot.topology(name).devices, chip)
        except ValueError as error:
            raise ConfigError(f"--plan.topology: {error}; and cpu:N") from error
        except ModuleNotFoundError as error:
            raise ConfigError(f"--plan.topology={name}: {error}") from error


def _cpus(count: int) -> Sequence[jax.Device]:
    with contextlib.suppress(RuntimeError):  # made once in a process, and there already
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices("cpu")) < count:
        raise ConfigError(
            f"--plan.topology=cpu:{count}: this process has {len(jax.devices('cpu'))} CPU devices"
        )
    return jax.devices("cpu")[:count]


@dataclasses.dataclass(frozen=True)
class Data:
    """What a plan has to know of the data set.

    Attributes:
      classes, examples: their numbers; examples of the training split, 0 where nothing asks.
      source: where they are from, in words.
    """

    classes: int
    examples: int
    source: str


def describe_data(config: ConfigDict, classes: int = 0, examples: int = 0) -> Data:
    """The sizes of the data set, which need not be there.

    Args:
      classes, examples: where above 0, what the flags say.

    Raises:
      DataError: where nobody knows, naming the flags.
    """
    needed = 1 if config.train.steps else examples
    if classes and needed:
        return Data(classes, examples, "--plan.classes and --plan.examples")
    name, split = config.data.name, config.data.train_split
    base = name.partition(":")[0]
    part = re.fullmatch(r"(\w+)(?:\[(\d*)(%?):(\d*)(%?)\])?", split)
    count = check.PUBLISHED.get(base, {}).get(part[1], 0) if part else 0
    if base in CLASSES and count:
        ends = [
            int(number) * (count / 100 if percent else 1) if number else default
            for number, percent, default in (
                (part[2], part[3], 0),
                (part[4], part[5], count),
            )
        ]
        known = round(min(ends[1], count)) - round(ends[0])
        return Data(classes or CLASSES[base], examples or known, f"the published sizes of {base}")
    try:
        source = evaluate_lib.open_split(config, split)
    except (DataError, ConfigError) as error:
        kind = DataError if isinstance(error, DataError) else ConfigError
        raise kind(
            f"{error}; without the data, --plan.classes=N and --plan.examples=N tell its sizes"
        ) from error
    return Data(classes or len(source.classes), examples or len(source), f"the data set {name}")


def plan(
    config: ConfigDict,
    *,
    topology: str,
    classes: int = 0,
    examples: int = 0,
    out: epath.PathLike = "",
) -> dict[str, Any]:
    """`--mode=plan`: compiles the training step for a topology, and tells what it would need.

    Prints the plan, and writes it as JSON to `out` where that is given.

    Args:
      config: as configs/default.py declares it.
      topology: "v5e:2x4", in chips, or "cpu:8".
      classes, examples: of the data set, where it is neither known nor there.

    Raises:
      ConfigError: before anything compiles, in one line: for what could not run there either.
      DataError: where the sizes of the data set are not known.
    """
    began = time.monotonic()
    if not topology:
        known = aot.known_topologies()
        raise ConfigError(f"--mode=plan needs --plan.topology: one of {known}; or cpu:N")
    target = Target.of(topology)
    data = describe_data(config, classes, examples)
    libtpu = {"libtpu": importlib.metadata.version("libtpu")} if target.chip else {}
    devices = len(target.devices)
    model = config_lib.validate(config, num_classes=data.classes, devices=devices)
    mesh = evaluate_lib.make_mesh(config, target.devices)
    per_core = images_per_core_second(config)
    # The batch is shared by all but those that share an image.
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    wanted = config.data.batch_size // shares
    unit = config.model.bn_group * config.train.accumulate
    compiling = functools.partial(start_compiling, config, data, target, shares)
    if target.chip:
        with aot.uncached():
            trials = compile_sizes(compiling, wanted, unit, target.limit)
    else:
        trials = [compiling(wanted)()]
    fitting = [trial for trial in trials if trial.fits and trial.images <= wanted]
    best = fitting[-1] if fitting else None
    found = {
        "estimates": "by compilation; nothing was run but the input",
        "model": config.model.name,
        "image_size": config.data.image_size,
        "batch_size": config.data.batch_size,
        "settings": {
            key: config_lib.flatten(config)[key]
            for key in ("model.dtype", "model.bn_group", "model.remat", "train.accumulate")
        },
        "topology": {
            "name": topology,
            "chips": devices // target.chip.devices if target.chip else 0,
            "devices": devices,
            "devices_per_chip": target.chip.devices if target.chip else 0,
            "mesh": dict(mesh.shape),
        },
        "data": {"name": config.data.name, **dataclasses.asdict(data)},
        "fits": bool(best and best.images == wanted) if target.chip else None,
        "images_per_device": {"wanted": wanted, "compiled": best.images if best else 0},
        "trials": [
            {
                "images_per_device": trial.images,
                "fits": trial.fits if target.chip else None,
                "bytes": trial.needed,
                "said": trial.said,
                "compile_seconds": round(trial.seconds, 1),
            }
            for trial in trials
        ],
        "largest_batch": _largest_batch(trials, unit, target, shares) if target.chip else None,
        "memory": {
            **(best.memory if best else {}),
            "total": best.needed if best else trials[0].needed,
            "limit": target.limit if target.chip else None,
        },
        "input": {
            "images_per_core_second": per_core,
            "measured": "now, on one core of this machine, with the configuration's own view",
            "cores": None,
        },
        **dict.fromkeys(("flops", "mfu", "seconds", "collectives", "images_per_second")),
        "schedule": {"steps": config_lib.total_steps(config, data.examples), "days": None},
        "versions": runtime.versions() | libtpu,
    }
    if best:
        found |= _step(config, model, target, best, shares, found)
    found["plan_seconds"] = round(time.monotonic() - began, 1)
    show(found)
    if out:
        files.write_whole(epath.Path(out), json.dumps(found, indent=1) + "\n")
        print(f"written to {out}")
    return found


def trace_step(
    config: ConfigDict, data: Data, target: Target, shares: int, images: int
) -> tuple[jax.stages.Traced, dict[str, float]]:
    """The step for so many images a device, and the bytes of a device that it holds, by kind."""
    config = config.copy_and_resolve_references()
    parts = config.train.accumulate = math.gcd(images, config.train.accumulate)
    config.data.batch_size = images * shares
    config.model.bn_group = math.gcd(images // parts, config.model.bn_group)
    model = config_lib.build_model(config, num_classes=data.classes)
    mesh = evaluate_lib.make_mesh(config, target.devices)
    schedule = recipe.schedule(config, config_lib.total_steps(config, data.examples))
    tx = recipe.optimizer(config, schedule)
    init = recipe.init_state(config, model, tx, mesh)
    state = jax.eval_shape(init, jax.random.key(config.seed))
    shardings = sharding.state_shardings(state, mesh)
    state, batch = abstract_on(state, shardings), recipe.abstract_batch(config, mesh)
    step = recipe.jitted_train_step(config, model, tx, schedule, mesh, shardings)
    # halo_attention asks the default device what it is for, and so does Pallas where it is lowered.
    with jax.default_device(target.devices[0]):
        traced = step.trace(state, batch)
    kinds = {
        "parameters": state.params,
        "batch_statistics": state.batch_stats,
        "optimizer": state.opt_state,
        "averages": state.ema,
        "batch": batch,
    }
    return traced, {kind: _bytes_on_a_device(tree) for kind, tree in kinds.items()}


def start_compiling(
    config: ConfigDict, data: Data, target: Target, shares: int, images: int
) -> Callable[[], Trial]:
    """Traces the step for so many images a device, and returns what compiles it."""
    began = time.monotonic()
    step, held = trace_step(config, data, target, shares, images)
    with jax.default_device(target.devices[0]):
        lowered = step.lower()
    traced = time.monotonic() - began

    def compile_it() -> Trial:
        began = time.monotonic()
        try:
            with jax.default_device(target.devices[0]):
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
            seconds = time.monotonic() - began + traced
            return Trial(images, bytes_said(said), False, {}, None, said, seconds)
        memory = _memory(held, compiled.memory_analysis())
        needed = sum(memory.values())
        seconds = time.monotonic() - began + traced
        return Trial(images, needed, needed <= target.limit, memory, compiled, "", seconds)

    return compile_it


def _bytes_on_a_device(tree: Any) -> float:
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return float(
        sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=1))
    )


def _memory(held: dict[str, float], said: Any) -> dict[str, float]:
    """Bytes of a device by kind."""
    return held | {
        "waiting_batches": WAITING * held["batch"],
        "padding": max(0.0, said.argument_size_in_bytes - sum(held.values())),
        "temporaries": said.temp_size_in_bytes,
        "outputs": max(0, said.output_size_in_bytes - said.alias_size_in_bytes),
        "code": said.generated_code_size_in_bytes,
    }


def _largest_batch(
    trials: Sequence[Trial], unit: int, target: Target, shares: int
) -> dict[str, Any]:
    images = largest(trials, unit, target.limit)
    return {"images_per_device": images, "batch_size": images * shares}


def _step(
    config: ConfigDict,
    model: HaloNet,
    target: Target,
    trial: Trial,
    shares: int,
    found: dict[str, Any],
) -> dict[str, Any]:
    """What there is to say of a compiled step: work, exchanges and, for TPUs, time."""
    size, images = config.data.image_size, trial.images * shares
    adds = sum(part.cost.total for part in cost.cost(model, size, size))
    # The backward pass has two products for each of the forward pass; what is computed again
    # (remat) does not count.
    flops = 3 * 2 * adds
    operations = tuple(hlo.operations(trial.compiled.as_text()))
    exchanges = {
        kind: {
            "count": sum(times for times, _, _ in groups),
            "bytes": sum(made for _, made, _ in groups),
        }
        for kind, groups in hlo.collectives(operations).items()
    }
    said = {
        "flops": {
            "per_image": flops,
            "per_step": flops * images,
            "per_step_and_device": flops * images / len(target.devices),
        },
        "collectives": exchanges,
    }
    if not target.chip:
        return said
    for kind, groups in hlo.collectives(operations).items():
        exchanges[kind]["seconds"] = sum(
            aot.exchange_seconds(kind, made, group, target.name) for _, made, group in groups
        )
    layers = {(s, b): it for s, b, it in tpu_kernels.attention_layers(model, size)}
    parts = math.gcd(trial.images, config.train.accumulate)
    try:
        filled = [
            tpu_kernels.with_kernel_cycles(
                op,
                layers=layers,
                images=trial.images // parts,
                generation=target.generation,
                chip=target.chip,
                rows=len(target.devices) // shares,
            )
            for op in operations
        ]
    except ValueError as error:
        return said | {"no_time": str(error)}
    program = aot.Program(trial.compiled, target.chip, tuple(op for op, _ in filled))
    seconds = _seconds(program, filled, exchanges, target)
    peak = 1e12 * target.chip.teraflops / target.chip.devices * len(target.devices)
    rates = {
        "estimate": images / seconds["estimate"],
        "low": images / seconds["high"],
        "high": images / seconds["low"],
    }
    total = found["schedule"]["steps"] * config.data.batch_size
    days = {"estimate": total / rates["estimate"] / 86_400}
    days |= {"low": total / rates["high"] / 86_400, "high": total / rates["low"] / 86_400}
    cores = rates["high"] / found["input"]["images_per_core_second"]
    return said | {
        "seconds": seconds,
        "mfu": {name: flops * rate / peak for name, rate in rates.items()},
        "images_per_second": rates,
        "schedule": found["schedule"] | {"images": total, "days": days},
        "input": found["input"] | {"cores": cores},
    }


def _seconds(
    program: aot.Program,
    filled: Sequence[tuple[hlo.Operation, str]],
    exchanges: dict[str, dict[str, Any]],
    target: Target,
) -> dict[str, Any]:
    """The time of a step: as estimated, and between what bounds by what others have measured.

    Exchanges are added to it, as though nothing of them were hidden behind the rest.
    """
    hertz = 1e9 * target.chip.gigahertz
    guessed = sum(program.roofline_cycles(op) for op, like in filled if like) / hertz
    factor = tpu_kernels.uncertainty(target.generation) if guessed else 1.0
    exchanged = sum(it["seconds"] for it in exchanges.values())
    least, most = MEASURED
    known = program.seconds - guessed
    return {
        "estimate": program.seconds + exchanged,
        "low": least * (known + guessed / factor) + exchanged,
        "high": most * (known + guessed * factor) + exchanged,
        "measured_over_estimated": list(MEASURED),
        "kernels": program.kernel_cycles / hertz,
        "kernels_guessed": guessed,
        "kernels_guessed_within": factor,
        "kernels_guessed_from": sorted({like for _, like in filled if like}),
        "collectives": exchanged,
    }


def images_per_core_second(config: ConfigDict, seconds: float = 1.0) -> float:
    """Training images that a core of this machine makes, by the configuration's own view.

    Of a drawn photograph, or of pixels for data sets that hold such.
    """
    size, name = config.data.image_size, config.data.name
    pixels = name == "mnist5k" or name.startswith("fake:")
    image = np.full((size, size, 3), 128, np.uint8) if pixels else check.photograph()
    return check.core_rate(config_lib.random_view(config), image, seconds)
