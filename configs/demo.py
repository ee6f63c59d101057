"""configs/mnist.py on a shorter schedule: what `make demo` runs, in minutes on a laptop."""

from configs import mnist


def get_config():
    """Sixteen epochs."""
    config = mnist.get_config()
    config.train.epochs = 16
    return config
