"""The wide H4 on ImageNet-21k: pre-training for configs/imagenet21k_finetune.py.

    python main.py --config=configs/imagenet21k.py --workdir=runs/imagenet21k \\
        --config.data.data_dir=DATA_DIR
    python main.py --config=configs/imagenet21k.py:halonet_h4_wide_conv12 \\
        --workdir=runs/imagenet21k_conv12 --config.data.data_dir=DATA_DIR

DATA_DIR/train holds one folder of images a class, as the archives unpack: 21,841 of them with 14
million images, of which the hash of the file's name holds out 1 %.

What this leads to is published (see configs/imagenet21k_finetune.py); an accuracy on ImageNet-21k
itself is not. The recipe is NOT the paper's, which no source that could be opened has: comments say
"recollection" (of the paper, not verified) or "ours". Images of 256 px are a recollection, and that
the blocks have 8 pixels, so that the last map is one block as in H4's own size, is ours. Hardware:
none that this was run on; the paper used 32 TPUv3 cores (recollection).
"""

from configs import default

VARIANTS = ("halonet_h4_wide", "halonet_h4_wide_conv12")


def get_config(variant="halonet_h4_wide"):
    """The recipe of a variant; comments give the source of each number."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant '{variant}'; there are: {', '.join(VARIANTS)}")
    config = default.get_config()
    config.model.name = variant
    config.model.dtype = "bfloat16"  # recollection
    config.model.bn_group = 32  # ours
    config.model.block_size = 8  # ours
    config.model.drop_path = 0.1  # ours

    config.data.name = "folder"
    config.data.train_split = "train[:99%]"  # ours
    config.data.eval_split = "train[99%:]"  # ours
    config.data.image_size = 256  # recollection
    config.data.crop_pct = 0.875  # ours
    config.data.interpolation = "bicubic"  # ours
    config.data.batch_size = 4096  # recollection
    config.data.damaged = "skip"  # ours: among so many files a few are cut short
    config.data.workers = 16  # ours

    config.augment.crop_min_area = 0.08  # recollection: Inception's crop
    config.augment.flip = True  # recollection

    config.train.epochs = 90  # recollection
    config.train.label_smoothing = 0.1  # ours

    config.optim.name = "sgd"  # recollection, with Nesterov's momentum
    config.optim.learning_rate = 1.6  # recollection
    config.optim.base_batch = 4096  # recollection: the batch of that rate
    config.optim.warmup = 10 / 90  # recollection: 10 epochs, then a cosine
    config.optim.momentum = 0.9  # recollection
    config.optim.weight_decay = 4e-5  # ours: less than with a tenth of the images
    config.optim.clip_norm = 0.0  # ours

    config.eval.every_steps = 10_000  # ours
    config.eval.batch_size = 1024  # ours
    config.checkpoint.every_steps = 2_000  # ours
    return config
