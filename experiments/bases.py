"""What the sweeps start from: a small model on digits, or a recipe on ImageNet.

Every number here is ours.
"""

from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from configs import imagenet, mnist

SCALES = ("full", "smoke")


def get_config(scale: str) -> ConfigDict:
    """The configuration of a sweep about parts of the model: which stay, and which are changed.

    "full": H1 by the recipe of configs/imagenet.py, in 100 epochs instead of 350, as a comparison
    can have them; "smoke": halonet_tiny by that of configs/mnist.py, in 4 epochs instead of 24 and
    in smaller batches.
    """
    check_scale(scale)
    if scale == "smoke":
        config = mnist.get_config()
        config.data.batch_size = 32
        config.train.epochs = 0
        config.train.steps = 500  # 4 epochs of 4,000 digits; as steps, so that all know how many
        config.train.ema_decay = 0.99  # averages of a short run
        config.eval.every_steps = 250
        config.checkpoint.every_steps = 125
        return config
    config = imagenet.get_config("halonet_h1")
    config.train.epochs = 100
    config.optim.warmup = 10 / 100
    return config


def check_scale(scale: str) -> None:
    """Raises ValueError for what is no scale."""
    if scale not in SCALES:
        raise ValueError(f"unknown scale '{scale}'; there are: {', '.join(SCALES)}")


def with_seeds(scale: str, members: Iterable[dict]) -> Iterator[dict]:
    """Yields the members as they are or, of the smoke scale, each with three seeds.

    All have their first run before one has its second: so each is compiled but once, and what is
    cut short can be compared already.
    """
    members = list(members)
    if scale == "full":
        yield from members
        return
    for seed in range(3):
        for member in members:
            yield {**member, "name": f"{member['name']}-seed{seed}", "seed": seed}
