"""Every key of the configuration, once, with its unit. Other configs are this plus overrides.

No key is None, so that each can be overridden from the command line
(`--config.optim.learning_rate=0.1`); where a number can be unset, 0 says so.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults: what a config does not set."""
    config = ConfigDict()
    config.seed = 0  # of the weights and of the data order

    config.model = ConfigDict()
    config.model.name = "halonet_h0"  # one of halonet.list_models()
    config.model.dtype = "float32"  # of the computation: float32 or bfloat16
    config.model.bn_group = 32  # examples per group of batch-norm statistics
    # What the backward pass computes again instead of keeping it: less memory, a longer step.
    config.model.remat = "none"  # none, attention or block (each residual block)
    # What differs from the named model; empty, 0 or -1: nothing does. See halonet.models.HaloNet.
    config.model.plan = ""  # c (convolution) or h (halo attention) a stage or a block: c/c/h/h
    config.model.depths = ()  # residual blocks of each stage; (): the named model's
    config.model.widths = ()  # channels inside the blocks of each stage; (): the named model's
    config.model.block_size = 0  # pixels of each stage's map; 0: the named model's
    config.model.halo_size = -1  # likewise; -1: the named model's
    config.model.border = ""  # zeros or mask: what lies outside the image
    config.model.positions = ""  # exact, contiguous or none: how relative tables are indexed
    config.model.downsample = ""  # queries or pool: how attention halves the map
    config.model.activation = ""  # relu or silu
    config.model.channel_attention = ""  # none, se or eca
    config.model.drop_path = 0.0  # stochastic depth: of the last block, growing from 0 at the first
    config.model.dropout = 0.0  # of the pooled channels, before the classifier
    config.model.pad_to_blocks = False  # images of any size: each map padded to whole blocks

    config.init = ConfigDict()
    config.init.scheme = "own"  # of what starts fresh: the models' own, or mindcv
    config.init.weights = ""  # a run's folder, or one of its checkpoints, to start from; "": none
    config.init.skip = ""  # what of them is left out and starts fresh: head, or head,stage4_block3

    config.data = ConfigDict()
    config.data.name = "mnist5k"  # or folder, fake:EXAMPLES:CLASSES, a TensorFlow Datasets name
    config.data.data_dir = ""  # the folder of images, or of prepared data sets: this may be gs://
    config.data.train_split = "train"  # name, or a slice: train[:99%], and train[99%:] to tune on
    config.data.eval_split = "test"  # likewise
    config.data.image_size = 256  # pixels, height and width
    config.data.crop_pct = 1.0  # share of the shorter side that evaluation sees
    config.data.interpolation = "bilinear"  # or bicubic
    config.data.batch_size = 128  # examples per step, over all devices and processes
    config.data.mean = (0.485, 0.456, 0.406)  # per channel, white is 1: ImageNet's
    config.data.std = (0.229, 0.224, 0.225)  # per channel
    config.data.damaged = "raise"  # or skip: another takes the place of a damaged training image
    config.data.damaged_limit = 100  # images so replaced in an epoch; more of them end the run
    config.data.threads = 1  # host threads that read and augment, in each process that does
    config.data.workers = 0  # processes that do, for each trainer; 0: the trainer itself

    config.augment = ConfigDict()
    config.augment.crop_min_area = 0.0  # of the random resized crop, a share; 0: the middle
    config.augment.flip = False  # left and right, every second time
    config.augment.rand_augment = ""  # in timm's notation: rand-m9-n2-mstd0.5-inc1
    config.augment.rand_augment_interpolation = "random"  # of its moves: or bilinear, bicubic
    config.augment.color_jitter = 0.0  # of brightness, contrast, saturation; not with rand_augment
    config.augment.erase = 0.0  # probability of random erasing
    config.augment.erase_fill = "pixel"  # noise of each pixel, or mean
    config.augment.erase_area = (0.02, 1 / 3)  # least and most, as a share of the image's
    config.augment.erase_aspect = (0.3, 10 / 3)  # least and most height by width
    config.augment.erase_attempts = 10  # at a rectangle that fits into the image
    config.augment.rotate = 0.0  # degrees either way
    config.augment.scale = 0.0  # largest relative change of size
    config.augment.translate = 0.0  # largest shift, as a fraction of the image size
    config.augment.mixup = 0.0  # alpha of MixUp's shares; 0: none
    config.augment.cutmix = 0.0  # alpha of CutMix's; 0: none
    config.augment.cutmix_probability = 0.5  # of CutMix for a batch, where both are on
    config.augment.repeats = 1  # times that a batch holds each of its images, changed differently

    config.train = ConfigDict()
    config.train.steps = 0  # optimizer steps; 0: unset, epochs decide
    config.train.epochs = 0  # passes over the training split; 0: unset
    config.train.loss = "cross_entropy"  # or binary: one yes or no a class
    config.train.label_smoothing = 0.1  # probability spread over all classes
    config.train.target_threshold = 0.0  # of binary: targets above it are 1, others 0; 0: as is
    config.train.accumulate = 1  # parts of a batch, one after the other: less memory, same step
    config.train.skip_nonfinite = 0  # steps of a run left out for a loss that is none; 0: it ends
    config.train.hang_seconds = 1800.0  # without progress, then the process ends; 0: it never does
    config.train.ema_decay = 0.0  # of averaged weights and batch statistics; 0: none are kept

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw, lamb, sgd (Nesterov) or rmsprop (as EfficientNet's)
    config.optim.learning_rate = 1e-3  # peak
    config.optim.base_batch = 0  # the rate is for so many images a step, scaled; 0: as it is
    config.optim.warmup = 0.05  # fraction of the run, linear; then a cosine to the floor
    config.optim.floor = 0.0  # last learning rate; scaled as the peak
    config.optim.momentum = 0.9  # of sgd and rmsprop; b1 of adamw and lamb
    config.optim.weight_decay = 0.05  # of kernels
    config.optim.decay_tables = False  # and of relative tables
    config.optim.clip_norm = 1.0  # largest global norm of the gradient; 0: no clipping

    config.eval = ConfigDict()
    config.eval.every_steps = 1000  # steps; the last step is always evaluated
    config.eval.batch_size = 200  # examples, over all devices and processes

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000  # steps; evaluated steps are always saved
    config.checkpoint.keep_latest = 2  # newest checkpoints kept, for resuming
    config.checkpoint.keep_best = 1  # checkpoints of the highest eval/top1 kept beside them

    config.mesh = ConfigDict()
    config.mesh.data = 0  # devices over which only the batch is split; 0: all that others leave
    config.mesh.fsdp = 1  # devices over which parameters are split too
    config.mesh.rows = 1  # devices that share each image, a part of its rows on each of them

    config.log = ConfigDict()
    config.log.every_steps = 50  # steps between rows of metrics
    config.log.profile = False  # trace five early steps for TensorBoard's profiler
    # A key that is not above is a mistake, in a config file as on the command line.
    return config.lock()
