"""Configurations: refused with one line before anything compiles, and kept in the workdir."""

import re

import jax
import pytest
from ml_collections import ConfigDict

from configs import default, mnist
from halonet.config import (
    AS_NAMED,
    ConfigError,
    build_model,
    center_view,
    check_devices,
    check_workdir,
    flatten,
    load_config,
    model_overrides,
    random_view,
    save_config,
    total_steps,
    validate,
    with_view_of,
)
from halonet.data.randaugment import RandAugment
from halonet.data.views import CenterView, RandomView
from halonet.models import create_model
from tests.small_run import small_config


@pytest.fixture
def config():
    """One that the eight devices of the tests can share."""
    config = mnist.get_config()
    config.model.bn_group = 4
    config.data.batch_size = 64
    return config


def test_flatten():
    config = ConfigDict({"seed": 3, "data": {"mean": [0.5, 0.25], "std": (1.0,)}, "none": {}})
    assert flatten(config) == {"seed": 3, "data.mean": (0.5, 0.25), "data.std": (1.0,)}


def test_validate_gives_the_model(config):
    config.model.dtype = "bfloat16"
    model = validate(config, num_classes=7)
    assert model == build_model(config, num_classes=7)
    assert (model.num_classes, model.bn_group, model.dtype) == (7, 4, "bfloat16")


def test_what_is_not_set_stays_as_the_named_model_has_it(config):
    named = create_model("halonet_tiny", num_classes=7, dtype="float32", bn_group=4)
    assert build_model(config, num_classes=7) == named
    assert set(AS_NAMED) < set(config.model)
    values = {
        "plan": "c/h",
        "depths": (1, 2),
        "widths": (16, 32),
        "block_size": 8,
        "halo_size": 0,
        "border": "mask",
        "positions": "contiguous",
        "downsample": "pool",
        "activation": "silu",
        "channel_attention": "se",
        "pad_to_blocks": True,
        "drop_path": 0.1,
        "dropout": 0.2,
    }
    assert set(values) == set(AS_NAMED)
    config.model.update(values)
    model = build_model(config, num_classes=7)
    assert {key: getattr(model, key) for key in values} == values


def test_a_model_from_a_file_is_the_one_that_was_saved(config, tmp_path):
    """JSON has lists for tuples, those that are not set among them."""
    config.model.widths = (16, 32)
    save_config(config, tmp_path)
    saved = load_config(tmp_path)
    assert isinstance(saved.model.depths, list)
    assert build_model(saved, num_classes=7) == build_model(config, num_classes=7)
    assert build_model(saved, num_classes=7).depths == (1, 3)
    assert model_overrides(saved) == model_overrides(config)


POSITIVE = (
    *("model.bn_group", "data.image_size", "data.batch_size", "optim.learning_rate"),
    *("eval.every_steps", "eval.batch_size", "checkpoint.every_steps"),
    *("checkpoint.keep_latest", "log.every_steps", "augment.repeats", "train.accumulate"),
    *("augment.erase_attempts", "mesh.rows"),
)
NOT_NEGATIVE = (
    *("seed", "data.damaged_limit", "data.threads", "data.workers", "augment.rotate"),
    *("train.steps", "train.epochs"),
    *("optim.weight_decay", "optim.clip_norm", "optim.base_batch", "optim.floor"),
    *("checkpoint.keep_best", "mesh.data", "augment.mixup", "augment.cutmix"),
    *("augment.color_jitter", "augment.crop_min_area", "augment.erase"),
)
FRACTIONS = (
    *("augment.scale", "augment.translate", "train.label_smoothing", "train.ema_decay"),
    *("optim.warmup", "optim.momentum", "train.target_threshold"),
)
BAD = [
    *((key, 0, "must be above 0") for key in POSITIVE),
    *((key, -1, "must be above 0") for key in POSITIVE),
    *((key, -1, "must not be negative") for key in NOT_NEGATIVE if key != "seed"),
    ("seed", -1, "must be from 0 to 4294967295"),
    ("seed", 2**32, "must be from 0 to 4294967295"),
    *((key, -0.1, "must be at least 0 and below 1") for key in FRACTIONS),
    *((key, 1.0, "must be at least 0 and below 1") for key in FRACTIONS),
    ("data.mean", (0.5,), "must have three numbers, one a channel"),
    ("data.std", (0.5, 0.5, 0.5, 0.5), "must have three numbers, one a channel"),
    ("data.std", (0.3, 0.0, 0.3), "must be above 0"),
    ("augment.cutmix_probability", 1.5, "must be from 0 to 1"),
    ("augment.crop_min_area", 1.5, "must be from 0 to 1"),
    ("augment.erase", 1.5, "must be from 0 to 1"),
    (
        "augment.erase_area",
        (0.0, 0.5),
        "must be two finite numbers above 0, the smaller first, none above 1",
    ),
    (
        "augment.erase_area",
        (0.5, 1.5),
        "must be two finite numbers above 0, the smaller first, none above 1",
    ),
    ("augment.erase_area", ("a", "b"), "must be two finite numbers above 0, the smaller first"),
    ("augment.erase_aspect", (0.3, float("inf")), "must be two finite numbers above 0, the"),
    ("augment.erase_aspect", (3.0, 0.3), "must be two finite numbers above 0, the smaller first$"),
    (
        "augment.erase_aspect",
        (0.3, 1.0, 3.0),
        "must be two finite numbers above 0, the smaller first$",
    ),
    ("data.crop_pct", 0.0, "must be above 0, up to 1"),
    ("data.crop_pct", 1.1, "must be above 0, up to 1"),
    ("optim.learning_rate", float("nan"), "must"),
    ("optim.learning_rate", float("inf"), "must"),
    ("optim.weight_decay", float("nan"), "must"),
]


@pytest.mark.parametrize(("key", "value", "why"), BAD)
def test_value_out_of_range(config, key, value, why):
    if isinstance(value, int) and isinstance(flatten(config)[key], float):
        value = float(value)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=f"^config.{key}={re.escape(str(value))} .*{why}"):
        validate(config, num_classes=10)


@pytest.mark.parametrize("key", [*NOT_NEGATIVE, *FRACTIONS])
def test_zero_is_allowed(config, key):
    config.update_from_flattened_dict({key: type(flatten(config)[key])(0), "train.epochs": 1})
    if key == "train.epochs":
        config.update_from_flattened_dict({"train.epochs": 0, "train.steps": 1})
    validate(config, num_classes=10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train.steps": 0, "train.epochs": 0},
            "config.train.steps and config.train.epochs are both 0; set one of them",
        ),
        (
            {"optim.name": "adam"},
            "config.optim.name='adam' is not one of adamw, sgd, lamb, rmsprop",
        ),
        (
            {"init.scheme": "timm"},
            "config.init.scheme='timm' is not one of own, mindcv",
        ),
        (
            {"model.dtype": "float16"},
            "config.model.dtype='float16' is not one of float32, bfloat16",
        ),
        (
            {"model.name": "halonet_tinny"},
            "config.model: unknown model 'halonet_tinny'; did you mean 'halonet_tiny'?",
        ),
        (
            {"data.image_size": 28},
            "config.data.image_size=28: image height 28 cannot be cut into blocks of 4 in every "
            "stage (the last has stride 4); the nearest that work: 16 and 32; "
            "with pad_to_blocks any size does",
        ),
        (
            {"model.plan": "c"},
            "config.model: plan 'c' has 1 stages; depths (1, 3) have 2",
        ),
        (
            {"model.block_size": 7},
            "config.model: block_size 7 is odd, and queries are kept by twos; take an even one, or "
            "downsample 'pool'",
        ),
        ({"model.halo_size": -5}, "config.model: halo_size -5 must be at least 0"),
        (
            {"model.border": "wrap"},
            "config.model: border 'wrap' is unknown; there are: zeros, mask",
        ),
        (
            {"model.remat": "all"},
            "config.model: remat 'all' is unknown; there are: none, attention, block",
        ),
        (
            {"data.batch_size": 100},
            "config.data.batch_size=100 cannot be shared by 8 devices in groups of "
            "config.model.bn_group=4; the nearest that can: 96",
        ),
        (
            {"train.loss": "hinge"},
            "config.train.loss='hinge' is not one of cross_entropy, binary",
        ),
        (
            {"data.interpolation": "nearest"},
            "config.data.interpolation='nearest' is not one of bilinear, bicubic",
        ),
        (
            {"augment.erase_fill": "zero"},
            "config.augment.erase_fill='zero' is not one of pixel, mean",
        ),
        (
            {"augment.rand_augment_interpolation": "nearest"},
            "config.augment.rand_augment_interpolation='nearest' is not one of bilinear, bicubic, "
            "random",
        ),
        (
            {"augment.rand_augment": "auto-m9"},
            "config.augment: RandAugment 'auto-m9' starts with 'auto'; "
            "it must start with rand or randaug",
        ),
        (
            {"train.accumulate": 3},
            "config.data.batch_size=64 cannot be shared by 8 devices, 3 parts each "
            "(config.train.accumulate) in groups of config.model.bn_group=4; "
            "the nearest that can: 96",
        ),
        (
            {"augment.repeats": 3},
            "config.augment.repeats=3 does not divide config.data.batch_size=64",
        ),
        (
            {"model.drop_path": 1.0},
            "config.model: drop_path 1.0 must be at least 0 and below 1",
        ),
        (
            {"eval.batch_size": 3},
            "config.eval.batch_size=3 cannot be shared by 8 devices; the nearest that can: 8",
        ),
    ],
)
def test_message(config, values, message):
    config.update_from_flattened_dict(values)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        validate(config, num_classes=10)


def test_config_error_is_a_usage_error():
    assert issubclass(ConfigError, ValueError)
    assert ConfigError.exit_code == 2


@pytest.mark.parametrize(
    ("batch_size", "bn_group", "nearest"),
    [(1, 1, 8), (12, 1, 16), (15, 1, 16), (17, 1, 16), (64, 32, 256), (700, 32, 768)],
)
def test_check_devices_names_the_nearest(batch_size, bn_group, nearest):
    with pytest.raises(ConfigError, match=rf"config.eval.batch_size={batch_size} .* {nearest}$"):
        check_devices("eval.batch_size", batch_size, bn_group)
    check_devices("eval.batch_size", nearest, bn_group)


def test_check_devices_asks_for_the_devices_there_are(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    check_devices("eval.batch_size", 9)
    with pytest.raises(ConfigError, match=r"cannot be shared by 3 devices; .* can: 9$"):
        check_devices("eval.batch_size", 8)


def test_a_configuration_is_checked_for_devices_that_are_not_there(config):
    config.update_from_flattened_dict({"data.batch_size": 96, "model.bn_group": 32})
    with pytest.raises(ConfigError, match="cannot be shared by 8 devices"):
        validate(config, num_classes=10)
    with pytest.raises(ConfigError, match=r"eval.batch_size=200 cannot be shared by 3 devices"):
        validate(config, num_classes=10, devices=3)
    config.eval.batch_size = 300
    validate(config, num_classes=10, devices=3)


@pytest.mark.parametrize(
    ("steps", "epochs", "examples", "total"),
    [(0, 2, 640, 20), (0, 1, 650, 10), (0, 1, 700, 11), (0, 1, 5, 1), (7, 3, 640, 7)],
)
def test_total_steps(config, steps, epochs, examples, total):
    config.update_from_flattened_dict({"train.steps": steps, "train.epochs": epochs})
    assert total_steps(config, examples) == total


def test_saved_config_comes_back(config, tmp_path):
    save_config(config, tmp_path / "new" / "run")
    loaded = load_config(tmp_path / "new" / "run")
    assert flatten(loaded) == flatten(config)
    assert loaded.optim.learning_rate == config.optim.learning_rate
    assert tuple(loaded.data.mean) == config.data.mean


def test_same_config_twice(config, tmp_path):
    check_workdir(config, tmp_path / "new")
    save_config(config, tmp_path)
    check_workdir(config, tmp_path)


def test_a_run_from_before_a_key_existed_goes_on(config, tmp_path):
    old = config.copy_and_resolve_references()
    with old.unlocked():
        del old.model["plan"]
        del old.train["accumulate"]
        del old["init"]
    save_config(old, tmp_path)
    check_workdir(config, tmp_path)
    config.model.plan = "c/h"
    with pytest.raises(ConfigError, match="model.plan: '' there, 'c/h' now"):
        check_workdir(config, tmp_path)


def test_another_config_is_refused(config, tmp_path):
    save_config(config, tmp_path)
    config.update_from_flattened_dict(
        {"seed": 1, "data.std": (1.0, 1.0, 1.0), "optim.warmup": 0.5, "log.every_steps": 7}
    )
    std = mnist.get_config().data.std
    differing = (
        f"data.std: {std} there, (1.0, 1.0, 1.0) now; "
        "optim.warmup: 0.05 there, 0.5 now; seed: 0 there, 1 now"
    )
    message = (
        f"{tmp_path} belongs to a run of another configuration ({differing}); "
        "take another --workdir, or the old values"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_workdir(config, tmp_path)


# None of these changes what is computed.
MAY_CHANGE = {
    *("train.hang_seconds", "train.skip_nonfinite"),
    *("data.data_dir", "data.threads", "data.workers", "data.damaged_limit", "eval.batch_size"),
    *("log.every_steps", "log.profile"),
    *("checkpoint.every_steps", "checkpoint.keep_latest", "checkpoint.keep_best"),
    *("mesh.data", "mesh.fsdp", "mesh.rows", "model.remat"),
}


@pytest.mark.parametrize("key", flatten(mnist.get_config()))
def test_each_key_may_change_or_is_refused(config, tmp_path, key):
    save_config(config, tmp_path)
    value = flatten(config)[key]
    other = {str: "other", tuple: (9.0, 9.0, 9.0), bool: True}.get(type(value))
    config.update_from_flattened_dict({key: other or value + 1})
    if key in MAY_CHANGE:
        check_workdir(config, tmp_path)
    else:
        with pytest.raises(ConfigError, match=rf"\({key}: [^;]* there, [^;]* now\)"):
            check_workdir(config, tmp_path)


def test_folder_without_a_run(tmp_path):
    message = f"{tmp_path} holds no run: there is no config.json in it"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_config(tmp_path)


def test_torn_config_names_its_file(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0, "mod')
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/config.json")):
        load_config(tmp_path)


def test_views_are_what_the_keys_say(config):
    config.update_from_flattened_dict(
        {
            "data.crop_pct": 0.95,
            "data.interpolation": "bicubic",
            "augment.crop_min_area": 0.08,
            "augment.flip": True,
            "augment.rand_augment": "rand-m9-n2-mstd0.5-inc1",
            "augment.color_jitter": 0.4,
            "augment.erase": 0.25,
            "augment.erase_fill": "mean",
            "augment.erase_area": (0.02, 0.33),
            "augment.erase_aspect": (0.3, 3.3),
            "augment.erase_attempts": 1,
            "augment.rand_augment_interpolation": "bilinear",
            "augment.rotate": 5.0,
            "augment.scale": 0.1,
            "augment.translate": 0.2,
        }
    )
    view = random_view(config)
    assert view.center == center_view(config) == CenterView(32, 0.95, "bicubic")
    assert (view.min_area, view.flip, view.color_jitter) == (0.08, 0.5, 0.4)
    assert view.rand_augment == RandAugment.parse(
        "rand-m9-n2-mstd0.5-inc1", interpolation="bilinear"
    )
    assert (view.rotate, view.scale, view.translate) == (5.0, 0.1, 0.2)
    erasing = view.erasing.keywords
    assert erasing == {
        "probability": 0.25,
        "mean": config.data.mean,
        "std": config.data.std,
        "fill": "mean",
        "area": (0.02, 0.33),
        "aspect": (0.3, 3.3),
        "attempts": 1,
    }


def test_the_view_of_another_configuration(config):
    trained = small_config(**{"data.crop_pct": 0.9, "data.interpolation": "bicubic"})
    config.update_from_flattened_dict({"data.crop_pct": 0.5, "data.image_size": 64})
    assert center_view(with_view_of(config, trained, ())) == CenterView(64, 0.9, "bicubic")
    chosen = ("data.crop_pct", "seed")
    assert center_view(with_view_of(config, trained, chosen)) == CenterView(64, 0.5, "bicubic")
    assert center_view(config) == CenterView(64, 0.5, "bilinear")


def test_nothing_is_changed_unless_a_key_says_so():
    assert random_view(default.get_config()) == RandomView(CenterView(256))
