"""ResNet-50 on ImageNet: the baseline that everyone knows, as Flax's own example trains it.

    python main.py --config=configs/resnet50.py --workdir=runs/resnet50 \\
        --config.data.data_dir=DATA_DIR

DATA_DIR holds ImageNet as TensorFlow Datasets prepares it, as ArrayRecord.

Published: top-1 76.72 on 8 V100 in 13.2 hours, 250,200 steps (google/flax at 18f8f311,
examples/imagenet/README.md, configs/v100_x8.py); not reproduced here. "flax" below is that example;
its learning rate is of 256 images, scaled by the linear rule. What differs: TensorFlow's crops and
bicubic resizing there, Pillow's here; the example decays by a term of the loss, which is the same
gradient. It scores whole batches only, the first 49,664 of the 50,000 images, and ours all; its
epoch is 2502 steps, and ours 2502.3, 250,228 in all.
"""

from configs import default


def get_config():
    """The recipe; comments give the source of each number."""
    config = default.get_config()
    config.model.name = "resnet50"  # flax
    config.model.bn_group = 64  # flax: each of 8 devices normalises its 64 images

    config.data.name = "imagenet2012"  # flax
    config.data.eval_split = "validation"  # flax
    config.data.image_size = 224  # flax
    config.data.crop_pct = 0.875  # flax: 224 of 256
    config.data.interpolation = "bicubic"  # flax
    config.data.batch_size = 512  # flax
    config.data.workers = 8  # ours

    config.augment.crop_min_area = 0.08  # flax
    config.augment.flip = True  # flax

    config.train.epochs = 100  # flax
    config.train.label_smoothing = 0.0  # flax

    config.optim.name = "sgd"  # flax, with Nesterov's momentum
    config.optim.learning_rate = 0.1  # flax
    config.optim.base_batch = 256  # flax
    config.optim.warmup = 5 / 100  # flax: 5 epochs, then a cosine to 0
    config.optim.momentum = 0.9  # flax
    config.optim.weight_decay = 1e-4  # flax
    config.optim.clip_norm = 0.0  # flax

    config.eval.every_steps = 2502  # flax: an epoch
    config.eval.batch_size = 512  # flax
    config.checkpoint.every_steps = 2502  # ours
    return config
