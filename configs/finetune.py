"""A pretrained HaloNet on one's own photographs, with a new classifier.

    python -m halonet.models.convert timm halonet50ts.safetensors --model=halonet50ts \\
        --out=runs/halonet50ts
    python main.py --config=configs/finetune.py --workdir=runs/mine \\
        --config.data.data_dir=~/photographs --config.init.weights=runs/halonet50ts

The folder holds one folder of images a class (a tenth of the images is held out), or train/ and
val/ with such folders in them. Its classes make the new classifier; all else starts from the
weights, averaged where their run kept averages. Weights of another model: its name goes into
--config.model.name; another block or halo size, and --config.model.block_size, say, resize the
relative tables. Any run of this program does as well as converted weights, for
--config.init.weights.

Hardware: one GPU of 16 GB or so; --config.train.accumulate=2 halves the memory, and
--config.model.dtype=float32 is for what has no bfloat16. Two GPUs share the batch as it is; four or
eight need --config.model.bn_group=16 or 8, the images of each. Accuracy depends on the photographs:
none is published. Every number below is ours, but for what the weights of halonet50ts were trained
and scored with (published: timm's results, 256 px, bicubic, a crop of 94 %).
"""

from configs import default


def get_config():
    """Thirty epochs, for a thousand images or a hundred thousand."""
    config = default.get_config()
    config.model.name = "halonet50ts"
    config.model.dtype = "bfloat16"
    config.model.bn_group = 32
    config.model.drop_path = 0.1

    config.init.weights = "runs/halonet50ts"
    config.init.skip = "head"

    config.data.name = "folder"
    config.data.eval_split = "val"
    config.data.image_size = 256  # published
    config.data.crop_pct = 0.94  # published
    config.data.interpolation = "bicubic"  # published
    config.data.batch_size = 64
    config.data.threads = 8

    # Larger parts of the image than in training from scratch: what is learned is little.
    config.augment.crop_min_area = 0.25
    config.augment.flip = True
    config.augment.rand_augment = "rand-m7-mstd0.5-inc1"
    config.augment.rand_augment_interpolation = "bicubic"

    config.train.epochs = 30
    config.train.label_smoothing = 0.1
    config.train.ema_decay = 0.99
    config.optim.name = "adamw"
    config.optim.learning_rate = 3e-4
    config.optim.base_batch = 64
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.05

    config.eval.every_steps = 200
    config.eval.batch_size = 64
    config.checkpoint.every_steps = 200
    config.log.every_steps = 20
    return config
