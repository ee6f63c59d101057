"""The configuration of a run: read from the command line, checked, kept in the workdir.

Everything that can be known to be wrong is refused here, in one line, before anything compiles.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from halonet import optim
from halonet.data import augment, workers
from halonet.data.randaugment import INTERPOLATIONS, RandAugment
from halonet.data.views import CenterView, RandomView
from halonet.files import write_whole
from halonet.models import SCHEMES, HaloNet, create_model

# What may change between the starts of one run: none of it changes what is computed.
MAY_CHANGE = (
    *("log.", "checkpoint.", "mesh.", "model.remat", "train.hang_seconds", "train.skip_nonfinite"),
    *("data.data_dir", "data.threads", "data.workers", "data.damaged_limit", "eval.batch_size"),
)

# The values of config.model that leave a field as the named model has it.
AS_NAMED = {
    **dict.fromkeys(("plan", "border", "positions", "downsample"), ""),
    **dict.fromkeys(("activation", "channel_attention"), ""),
    **dict.fromkeys(("depths", "widths"), ()),
    "block_size": 0,
    "halo_size": -1,
    "pad_to_blocks": False,
    "drop_path": 0.0,
    "dropout": 0.0,
}

# What keys that came later mean where a saved configuration lacks them.
ADDED = {
    **{f"model.{key}": value for key, value in AS_NAMED.items()},
    "init.scheme": "own",
    **dict.fromkeys(("init.weights", "init.skip"), ""),
    "data.crop_pct": 1.0,
    "data.interpolation": "bilinear",
    "data.workers": 0,
    "data.damaged": "raise",
    "data.damaged_limit": 100,
    **dict.fromkeys(("augment.crop_min_area", "augment.color_jitter", "augment.erase"), 0.0),
    "augment.flip": False,
    "augment.rand_augment": "",
    "augment.rand_augment_interpolation": "random",
    "augment.erase_fill": "pixel",
    "augment.erase_area": (0.02, 1 / 3),
    "augment.erase_aspect": (0.3, 10 / 3),
    "augment.erase_attempts": 10,
    **dict.fromkeys(("augment.mixup", "augment.cutmix"), 0.0),
    "augment.cutmix_probability": 0.5,
    "augment.repeats": 1,
    "train.loss": "cross_entropy",
    "train.target_threshold": 0.0,
    "train.accumulate": 1,
    "train.skip_nonfinite": 0,
    "train.hang_seconds": 1800.0,
    "optim.base_batch": 0,
    "optim.floor": 0.0,
    "optim.decay_tables": False,
    "mesh.rows": 1,
}


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line."""

    exit_code = 2


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Keys with dots to values: {"model.name": "halonet_h0", ...}."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in _walk(config.to_dict(), "")
    }


def _walk(tree: dict[str, Any], prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# What reading flags raises, a config file among them.
_UNREADABLE = (
    *(flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError),
    *(ImportError, NameError, SyntaxError),
)


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's flag parser, with one clear line and exit code 2 for what it refuses.

    Give it to `absl.app.run(main, flags_parser=...)`. `values` are other flags than main's, one of
    which is `config`.
    """
    try:
        rest = values(list(argv))
        if len(rest) > 1:
            raise flags.Error(f"'{rest[1]}' is not a flag; did you mean '--{rest[1]}'?")
        values.config.to_dict()  # a file that cannot be read is known only when it is used
        return rest
    except _UNREADABLE as error:
        print(f"error: {_explain(argv, error, values)}", file=sys.stderr)
        sys.exit(2)


def _explain(argv: Sequence[str], error: Exception, values: flags.FlagValues) -> str:
    """What is wrong with the command line: the key, its value and the nearest good one."""
    path = _config_path(argv)
    file = path.partition(":")[0]  # what follows chooses a variant
    if path and not epath.Path(file).exists():
        return f"--config={path}: there is no such file"
    if not path:
        return _one_line(error)
    # Afresh: where an override is unknown, the flag itself holds no configuration.
    try:
        config = values["config"].parser.parse(path)
    except Exception as in_file:  # the file is a program: anything can be wrong in it
        # Where it is a type or a value, ml_collections puts the whole traceback into the message.
        return f"{path}: {_one_line(in_file.__context__ or in_file)}"
    if not isinstance(config, ConfigDict):
        return f"{path}: its get_config() returns no ConfigDict but a {type(config).__name__}"
    known = list(flatten(config))
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("--") or not name.startswith("config."):
            continue
        if not equals:
            value = following
        key = name.removeprefix("config.")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
                k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]
            ]
            hint = f"did you mean '{close[0]}'?" if close else "configs/default.py lists them"
            return f"no config key '{key}' (value '{value}'); {hint}"
        if f"config.{key}" in str(error):
            now = _lookup(config, key)
            return f"config.{key}={value} is not of the key's type, {type(now).__name__}: now {now}"
    return _one_line(error)


def _config_path(argv: Sequence[str]) -> str:
    """The value of --config, in either way of writing it; "" where there is none."""
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return ""


def _lookup(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_values(config: ConfigDict) -> None:
    """Checks each key on its own.

    Raises:
      ConfigError: naming the key, its value and what would do.
    """
    flat = flatten(config)
    positive = (
        *("model.bn_group", "data.image_size", "data.batch_size", "optim.learning_rate"),
        *("eval.every_steps", "eval.batch_size", "checkpoint.every_steps"),
        *("checkpoint.keep_latest", "log.every_steps", "augment.repeats", "train.accumulate"),
        *("augment.erase_attempts", "mesh.rows"),
    )
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{key}={value} must be finite")
    if not 0 <= flat["seed"] < 2**32:
        raise ConfigError(f"config.seed={flat['seed']} must be from 0 to {2**32 - 1}")
    for key in positive:
        if flat[key] <= 0:
            raise ConfigError(f"config.{key}={flat[key]} must be above 0")
    not_negative = (
        *("data.damaged_limit", "data.threads", "data.workers", "augment.rotate"),
        *("train.hang_seconds", "train.skip_nonfinite", "train.steps", "train.epochs"),
        *("optim.weight_decay", "optim.clip_norm", "optim.base_batch", "optim.floor"),
        *("checkpoint.keep_best", "mesh.data", "augment.mixup", "augment.cutmix"),
        *("augment.color_jitter", "augment.crop_min_area", "augment.erase"),
    )
    for key in not_negative:
        if flat[key] < 0:
            raise ConfigError(f"config.{key}={flat[key]} must not be negative")
    if flat["data.workers"] and not workers.AVAILABLE:
        raise ConfigError(
            f"config.data.workers={flat['data.workers']} needs Linux; 0 makes batches in threads"
        )
    fractions = ("augment.scale", "augment.translate", "train.label_smoothing")
    fractions += ("train.target_threshold", "train.ema_decay", "optim.warmup", "optim.momentum")
    for key in fractions:
        if not 0 <= flat[key] < 1:
            raise ConfigError(f"config.{key}={flat[key]} must be at least 0 and below 1")
    for key in ("augment.cutmix_probability", "augment.crop_min_area", "augment.erase"):
        if not 0 <= flat[key] <= 1:
            raise ConfigError(f"config.{key}={flat[key]} must be from 0 to 1")
    if not 0 < flat["data.crop_pct"] <= 1:
        raise ConfigError(f"config.data.crop_pct={flat['data.crop_pct']} must be above 0, up to 1")
    for key, most in (("augment.erase_area", 1.0), ("augment.erase_aspect", math.inf)):
        numbers = _finite(flat[key])
        if len(flat[key]) != 2 or len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] <= most:
            raise ConfigError(
                f"config.{key}={flat[key]} must be two finite numbers above 0, the smaller first"
                + (f", none above {most:g}" if most < math.inf else "")
            )
    try:
        random_view(config)
    except ValueError as error:
        raise ConfigError(f"config.augment: {error}") from error
    for key in ("data.mean", "data.std"):
        if len(flat[key]) != 3 or len(_finite(flat[key])) != 3:
            raise ConfigError(f"config.{key}={flat[key]} must have three numbers, one a channel")
    if min(flat["data.std"]) <= 0:
        raise ConfigError(f"config.data.std={flat['data.std']} must be above 0")
    choices = {
        "init.scheme": SCHEMES,
        "optim.name": optim.OPTIMIZERS,
        "model.dtype": ("float32", "bfloat16"),
        "train.loss": ("cross_entropy", "binary"),
        "data.interpolation": tuple(INTERPOLATIONS),
        "data.damaged": ("raise", "skip"),
        "augment.erase_fill": augment.FILLS,
        "augment.rand_augment_interpolation": (*INTERPOLATIONS, "random"),
    }
    for key, known in choices.items():
        if flat[key] not in known:
            raise ConfigError(f"config.{key}={flat[key]!r} is not one of {', '.join(known)}")


def _finite(values: Sequence[Any]) -> list[float]:
    """Those that are numbers, and finite ones."""
    return [x for x in values if isinstance(x, int | float) and math.isfinite(x)]


def validate(config: ConfigDict, *, num_classes: int, devices: int = 0) -> HaloNet:
    """Checks all that training needs, how the keys fit to the devices too, and builds the model.

    Args:
      num_classes: of the data set.
      devices: that the run shall have; 0: those that there are.

    Raises:
      ConfigError: naming the key, its value and what would do.
    """
    check_values(config)
    if not (config.train.steps or config.train.epochs):
        raise ConfigError("config.train.steps and config.train.epochs are both 0; set one of them")
    try:
        model = build_model(config, num_classes=num_classes)
        model.check_fields()
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error
    batch, parts, rows = config.data.batch_size, config.train.accumulate, config.mesh.rows
    check_image_size(model, config.data.image_size, rows)
    check_devices("data.batch_size", batch, config.model.bn_group, parts, rows, devices)
    if batch % config.augment.repeats:
        repeats = config.augment.repeats
        raise ConfigError(
            f"config.augment.repeats={repeats} does not divide config.data.batch_size={batch}"
        )
    check_devices("eval.batch_size", config.eval.batch_size, rows=rows, devices=devices)
    return model


def center_view(config: ConfigDict) -> CenterView:
    """What evaluation sees of an image."""
    return CenterView(config.data.image_size, config.data.crop_pct, config.data.interpolation)


def with_view_of(config: ConfigDict, trained: ConfigDict, chosen: Collection[str]) -> ConfigDict:
    """A configuration that sees images as another does, but for the keys of `chosen`."""
    config = config.copy_and_resolve_references()
    for key in {"data.crop_pct", "data.interpolation"} - set(chosen):
        config.update_from_flattened_dict({key: _lookup(trained, key)})
    return config


def random_view(config: ConfigDict) -> RandomView:
    """What training sees of an image.

    Raises:
      ValueError: for a `rand_augment` that is none.
    """
    erasing = functools.partial(
        augment.random_erasing,
        probability=config.augment.erase,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        fill=config.augment.erase_fill,
        area=tuple(config.augment.erase_area),
        aspect=tuple(config.augment.erase_aspect),
        attempts=config.augment.erase_attempts,
    )
    rand_augment = None
    if config.augment.rand_augment:
        rand_augment = RandAugment.parse(
            config.augment.rand_augment, interpolation=config.augment.rand_augment_interpolation
        )
    return RandomView(
        center_view(config),
        min_area=config.augment.crop_min_area,
        rotate=config.augment.rotate,
        scale=config.augment.scale,
        translate=config.augment.translate,
        flip=0.5 if config.augment.flip else 0.0,
        rand_augment=rand_augment,
        color_jitter=config.augment.color_jitter,
        erasing=erasing if config.augment.erase else None,
    )


def build_model(config: ConfigDict, *, num_classes: int, **overrides: Any) -> HaloNet:
    """The model that a configuration names, with other values of its fields where given."""
    fields = flatten(config.model)
    name = fields.pop("name")
    own = {key: value for key, value in fields.items() if value != AS_NAMED.get(key)}
    return create_model(name, num_classes=num_classes, **{**own, **overrides})


def model_overrides(config: ConfigDict) -> dict[str, Any]:
    """The fields in which a configuration's model differs from the one that it names."""
    fields = flatten(config.model)
    return {key: value for key, value in fields.items() if value != AS_NAMED.get(key, value)}


def check_image_size(model: HaloNet, size: int, rows: int = 1) -> None:
    """Refuses images that the model's blocks do not divide, or `rows` devices cannot share."""
    try:
        model.check_image_size(size, size)
        model.check_row_devices(size, rows)
    except ValueError as error:
        raise ConfigError(f"config.data.image_size={size}: {error}") from error


def check_devices(
    key: str, batch_size: int, bn_group: int = 1, parts: int = 1, rows: int = 1, devices: int = 0
) -> None:
    """Refuses a batch that devices cannot share in parts of whole groups of batch-norm examples.

    Args:
      rows: devices of each image, a number that divides all of them or is refused elsewhere.
      devices: how many in all; 0: those that there are.
    """
    devices = max(1, (devices or jax.device_count()) // rows)
    unit = devices * bn_group * parts
    if batch_size % unit:
        groups = f" in groups of config.model.bn_group={bn_group}" if bn_group > 1 else ""
        pieces = f", {parts} parts each (config.train.accumulate)" if parts > 1 else ""
        each = f" times {rows} (config.mesh.rows)" if rows > 1 else ""
        raise ConfigError(
            f"config.{key}={batch_size} cannot be shared by {devices}{each} devices{pieces}"
            f"{groups}; the nearest that can: {max(1, round(batch_size / unit)) * unit}"
        )


def total_steps(config: ConfigDict, examples: int) -> int:
    """Optimizer steps of the whole run: `train.steps`, or else `train.epochs` of `examples`."""
    batches = config.train.epochs * examples / config.data.batch_size
    return config.train.steps or max(1, round(batches))


def check_workdir(
    config: ConfigDict,
    workdir: epath.PathLike,
    arrays: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Refuses a workdir that holds another run.

    Args:
      arrays: in which arrays the states of the two differ, a text for each; asked where keys do.

    Raises:
      ConfigError: listing the keys that differ, but for those of `MAY_CHANGE`, and the arrays.
    """
    if not (epath.Path(workdir) / "config.json").exists():
        return
    saved, now = flatten(load_config(workdir)), flatten(config)
    differing = [
        f"{key}: {saved.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise ConfigError(
            f"{workdir} belongs to a run of another configuration ({'; '.join(differing)}); "
            "take another --workdir, or the old values"
            + "".join(f"\n  {array}" for array in arrays())
        )


def save_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes config.json into `workdir`, which is made where it does not exist."""
    path = epath.Path(workdir) / "config.json"
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


def load_config(workdir: epath.PathLike) -> ConfigDict:
    """The configuration of the run in `workdir`: data, never code.

    Raises:
      ConfigError: where there is none.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run: there is no config.json in it")
    try:
        config = ConfigDict(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {_one_line(error)}") from error
    for key, value in ADDED.items():
        group, _, name = key.partition(".")
        # Weights converted from elsewhere have no more than a model and its images.
        if group not in config and "seed" in config:
            config[group] = ConfigDict()
        if group in config and name not in config[group]:
            config[group][name] = value
    return config
