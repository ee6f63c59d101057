"""Photographs of 2048 px, too large for one device: four devices share the rows of each image.

    python main.py --config=configs/large_images.py --workdir=runs/large \\
        --config.data.data_dir=~/slides --config.init.weights=runs/halonet_h0

For what is lost in 256 px: sections under a microscope, the ground from above, scanned pages. The
folder is as for configs/finetune.py, and so is all that is not below; the weights are those of any
run of H0 (configs/imagenet.py:halonet_h0), whose blocks and tables do not depend on the size.

Hardware: none that this was run on; meant for 32 devices of 16 GB, such as a slice v5e:4x8, in
hosts of four or eight, since the devices of an image are of one process. On four of them
--config.train.accumulate=8 makes the same step. Whether it fits, --mode=plan --plan.classes=N
--plan.examples=N --plan.topology=v5e:4x8 says. A group of batch norm is four images, spread over
four devices. Other sizes have whole rows of blocks on every device if they are multiples of 256 px
times mesh.rows. Accuracy depends on the photographs: none is published, and that of H0 at 256 px
was not reproduced here. Every number below is ours.
"""

from configs import finetune


def get_config():
    """configs/finetune.py, on a mesh whose third axis is that of the images' rows."""
    config = finetune.get_config()
    config.model.name = "halonet_h0"
    config.model.bn_group = 4
    config.init.weights = "runs/halonet_h0"

    config.data.image_size = 2048
    config.data.crop_pct = 1.0
    config.data.batch_size = 32
    config.data.workers = 8

    config.optim.base_batch = 32
    config.optim.learning_rate = 1.5e-4
    config.eval.batch_size = 32
    config.mesh.rows = 4
    return config
