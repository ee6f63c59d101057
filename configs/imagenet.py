"""H0 to H7 on ImageNet, one by name.

    python main.py --config=configs/imagenet.py:halonet_h4 --workdir=runs/halonet_h4 \\
        --config.data.data_dir=DATA_DIR

DATA_DIR holds ImageNet as TensorFlow Datasets prepares it, as ArrayRecord. To choose between
settings without looking at the validation images: --config.data.train_split='train[:99%]'
--config.data.eval_split='train[99%:]'.

| variant    | image, px | published top-1, % |   variant    | image, px | published top-1, % |
|------------|----------:|-------------------:|--------------|----------:|-------------------:|
| halonet_h0 |       256 |               77.9 |   halonet_h4 |       384 |               83.3 |
| halonet_h1 |       256 |               79.9 |   halonet_h5 |       448 |               84.0 |
| halonet_h2 |       256 |               80.4 |   halonet_h6 |       512 |               84.4 |
| halonet_h3 |       320 |               81.9 |   halonet_h7 |       600 |               84.9 |

Published, not reproduced here (the paper's table, as keras_cv_attention_models transcribes it). The
same table has H7 with convolutions in stage 1, 1 and 2, or 1 to 3: 84.6, 84.7 and 83.8; here
--config.model.name=halonet_h7_conv12 and so on beside configs/imagenet.py:halonet_h7.

The recipe is NOT the paper's: how it trained is known from no source that could be opened. What
follows is what we recall of it or of the same authors' work ("recollection", not verified), and
"ours" where not even that. Stronger regularisation of larger models is a recollection; each of its
magnitudes below is ours. Hardware: none that this was run on; the paper used TPUv3 (recollection).
On fewer devices --config.train.accumulate makes the same step of smaller parts, and with another
--config.data.batch_size the learning rate follows the linear rule.
"""

from configs import default

# Image size, published; the rest ours: RandAugment's magnitude, stochastic depth's last rate, and
# the dropout that EfficientNet's code has for B0 to B7, which the paper pairs with H0 to H7.
VARIANTS = {
    "halonet_h0": (256, 5, 0.0, 0.2),
    "halonet_h1": (256, 6, 0.05, 0.2),
    "halonet_h2": (256, 7, 0.1, 0.3),
    "halonet_h3": (320, 8, 0.1, 0.3),
    "halonet_h4": (384, 9, 0.15, 0.4),
    "halonet_h5": (448, 9, 0.2, 0.4),
    "halonet_h6": (512, 10, 0.25, 0.5),
    "halonet_h7": (600, 10, 0.3, 0.5),
}


def get_config(variant="halonet_h0"):
    """The recipe of a variant; comments give the source of each number."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant '{variant}'; there are: {', '.join(VARIANTS)}")
    image_size, magnitude, drop_path, dropout = VARIANTS[variant]
    config = default.get_config()
    config.model.name = variant
    config.model.dtype = "bfloat16"  # recollection
    config.model.bn_group = 32  # ours: 128 devices of 32 images each
    config.model.drop_path = drop_path
    config.model.dropout = dropout

    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.image_size = image_size
    config.data.crop_pct = 0.875  # ours: the middle that Inception's evaluation takes
    config.data.interpolation = "bicubic"  # ours
    config.data.batch_size = 4096  # recollection
    config.data.workers = 8  # ours

    config.augment.crop_min_area = 0.08  # recollection: Inception's crop
    config.augment.flip = True  # recollection
    config.augment.rand_augment = f"rand-m{magnitude}-n2-mstd0.5-inc1"  # ours

    config.train.epochs = 350  # recollection
    config.train.label_smoothing = 0.1  # recollection
    config.train.ema_decay = 0.9999  # ours: a recollection of the same authors' SASA

    config.optim.name = "sgd"  # recollection, with Nesterov's momentum
    config.optim.learning_rate = 1.6  # recollection
    config.optim.base_batch = 4096  # recollection: the batch of that rate
    config.optim.warmup = 10 / 350  # recollection: 10 epochs, then a cosine
    config.optim.floor = 0.0  # recollection
    config.optim.momentum = 0.9  # recollection
    config.optim.weight_decay = 8e-5  # ours: a recollection of the same authors' BoTNet
    config.optim.clip_norm = 0.0  # ours

    config.eval.every_steps = 1564  # ours: 5 epochs
    config.eval.batch_size = 1024  # ours
    config.checkpoint.every_steps = 313  # ours: an epoch
    return config
