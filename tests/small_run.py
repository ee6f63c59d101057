"""A run that takes seconds: shared by the tests of training, checkpoints and evaluation."""

from configs import mnist


def small_config(**overrides):
    """The digits config at a size for tests; overrides by dotted key."""
    config = mnist.get_config()
    settings = {
        "train.epochs": 0,
        "train.steps": 30,
        "data.batch_size": 16,
        "model.bn_group": 2,
        # What a step draws must be drawn again after an interruption, on any devices.
        "model.drop_path": 0.1,
        "augment.mixup": 0.2,
        "eval.batch_size": 200,
        "eval.every_steps": 15,
        "checkpoint.every_steps": 13,
        "checkpoint.keep_best": 2,
        "log.every_steps": 4,
        **overrides,
    }
    for key, value in settings.items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[name] = value
    return config
