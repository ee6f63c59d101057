"""What is said of a split, against numpy over all its examples at once: each counts once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet import evaluate, steps
from halonet.config import ConfigError, load_config
from halonet.data.errors import DataError
from halonet.health import OutOfMemory
from halonet.models import HaloNet, create_model
from tests.small_run import small_config
from tests.test_golden_run import GOLDEN, registered  # noqa: F401 (its model, in every test)

CLASSES = 7


class Noise:
    """Images and labels of random numbers; `sets` gives each any number of right labels."""

    name, split, fingerprint = "noise", "test", {"name": "noise"}
    classes = tuple("abcdefg")

    def __init__(self, examples, *, sets=False):
        rng = np.random.default_rng(examples)
        self.images = rng.integers(0, 256, (examples, 32, 32, 3)).astype(np.uint8)
        self.labels = rng.integers(0, CLASSES - 1, examples)  # the last class has none
        self.sets = (rng.random((examples, CLASSES)) < 0.2).astype(np.int32) if sets else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        example = {"image": self.images[index], "label": int(self.labels[index])}
        return example if self.sets is None else {**example, "labels": self.sets[index]}

    def where(self, index):
        return f"number {index}"


class Plane(HaloNet):
    """Logits that are a linear map of the pixels."""

    def apply(self, variables, images, train):
        assert not train
        return images.reshape(len(images), -1) @ variables["kernel"]


TINY = create_model("halonet_tiny", num_classes=CLASSES)
MODEL = Plane(**{it.name: getattr(TINY, it.name) for it in dataclasses.fields(TINY)})
KERNEL = 0.03 * np.random.default_rng(0).standard_normal((32 * 32, 3, CLASSES), np.float32)
# What all images have in common would make one class win everywhere.
VARIABLES = {"kernel": jnp.asarray((KERNEL - KERNEL.mean(axis=0)).reshape(-1, CLASSES))}


def scored(source, *, batch_size=8, devices=8):
    config = small_config(**{"eval.batch_size": batch_size})
    of_mesh = np.array(jax.devices()[:devices]).reshape(-1, 1, 1)
    mesh = jax.sharding.Mesh(of_mesh, ("data", "fsdp", "rows"))
    step = evaluate.make_suite_step(MODEL, config, mesh)
    batches = evaluate.eval_batches(config, source, mesh)
    return evaluate.score(evaluate.add_up(step, VARIABLES, batches), source.classes)


def probabilities(source):
    config = small_config()
    images = steps.normalize(
        jnp.asarray(source.images), tuple(config.data.mean), tuple(config.data.std)
    )
    return np.asarray(jax.nn.softmax(MODEL.apply(VARIABLES, images, train=False)))


def expected_calibration_error(confidence, correct, bins=15):
    """Guo et al.'s own loop over the bins."""
    total = 0.0
    for low, high in zip(np.arange(bins) / bins, (np.arange(bins) + 1) / bins, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("examples", "batch_size"), [(1, 8), (37, 8), (37, 48), (40, 40)])
def test_every_example_counts_once(examples, batch_size, devices):
    source = Noise(examples)
    found = scored(source, batch_size=batch_size, devices=devices)
    chances = probabilities(source)
    order = np.argsort(-chances, axis=-1)
    correct = order[:, 0] == source.labels
    assert found["count"] == examples
    assert found["top1"] == correct.sum() / examples
    assert found["top5"] == (order[:, :5] == source.labels[:, None]).any(axis=-1).sum() / examples
    losses = -np.log(chances[np.arange(examples), source.labels])
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-4)
    assert found["classes"] == {
        name: {
            "hits": int(correct[source.labels == label].sum()),
            "count": int((source.labels == label).sum()),
        }
        for label, name in enumerate(source.classes)
    }
    np.testing.assert_allclose(
        found["calibration_error"],
        expected_calibration_error(chances.max(axis=-1), correct),
        rtol=1e-4,
    )
    assert sum(found["calibration"]["count"]) == examples
    json.dumps(found)


def test_the_sums_tell_right_from_wrong():
    """Of the examples above some are right and some wrong, in several bins."""
    found = scored(Noise(37))
    assert 0 < found["top1"] < found["top5"] < 1
    assert sum(count > 0 for count in found["calibration"]["count"]) > 3
    assert found["calibration_error"] > 0.05
    assert found["classes"]["g"] == {"hits": 0, "count": 0}


@pytest.mark.parametrize("devices", [1, 8])
def test_any_label_of_a_set_is_right_and_an_empty_set_does_not_count(devices):
    source = Noise(61, sets=True)
    with_labels = source.sets.any(axis=-1)
    assert 5 < with_labels.sum() < 60
    found = scored(source, devices=devices)
    order = np.argsort(-probabilities(source), axis=-1)
    right = np.take_along_axis(source.sets, order, axis=-1)[with_labels]
    assert found["count"] == with_labels.sum()
    assert found["top1"] == right[:, 0].sum() / len(right)
    assert found["top5"] == right[:, :5].any(axis=-1).sum() / len(right)
    np.testing.assert_allclose(
        found["calibration_error"],
        expected_calibration_error(
            probabilities(source).max(axis=-1)[with_labels], right[:, 0].astype(float)
        ),
        rtol=1e-4,
    )
    assert "loss" not in found
    assert "classes" not in found


def test_without_any_label_there_is_nothing_to_score():
    source = Noise(9, sets=True)
    source.sets[:] = 0
    with pytest.raises(DataError, match="no example has a label"):
        scored(source)


def test_calibration_by_hand():
    """Two bins: 4 of 0.9 sure on average and half right, 1 of 0.3 sure and right."""
    sums = {name: np.zeros(15) for name in ("bin_count", "bin_top1", "bin_confidence")}
    sums["bin_count"][[4, 13]] = 1, 4
    sums["bin_top1"][[4, 13]] = 1, 2
    sums["bin_confidence"][[4, 13]] = 0.3, 3.6
    found = evaluate.score({"count": 5.0, "top1": 3.0, "top5": 5.0, **sums}, "ab")
    np.testing.assert_allclose(found["calibration_error"], (1 * 0.7 + 4 * 0.4) / 5)
    assert found["top1"] == 0.6
    assert found["calibration"]["top1"][4] == 1.0
    assert found["calibration"]["confidence"][0] == 0.0


def test_an_unknown_suite_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^--evaluate.suites: 'a' is not one of real, v2$"):
        evaluate.evaluate_checkpoint(small_config(), tmp_path, suites=["a"])
    config = small_config(**{"data.data_dir": str(tmp_path)})
    with pytest.raises(DataError, match="'imagenet2012_real' not found under"):
        evaluate.evaluate_checkpoint(config, tmp_path, suites=["real"])


def test_want_of_memory_is_told(tmp_path, monkeypatch):
    config = load_config(GOLDEN)

    def too_much(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(evaluate, "add_up", too_much)
    size = config.eval.batch_size
    with pytest.raises(OutOfMemory, match=f"^not enough memory for config.eval.batch_size={size},"):
        evaluate.evaluate_checkpoint(config, tmp_path, checkpoint=str(GOLDEN))
