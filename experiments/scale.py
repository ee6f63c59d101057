"""How does accuracy grow with the size of the model?

    python -m experiments run scale_smoke --jobs=2

The full scale is H0 to H7 on ImageNet, each by its own recipe of configs/imagenet.py, where image
size and regularisation grow with the model. The smoke scale has models on digits that grow as
those do, but by one number a step, in width or in depth, under one recipe.

The paper (verified, as transcribed by keras_cv_attention_models): top-1 of H0 to H7 77.9, 79.9,
80.4, 81.9, 83.3, 84.0, 84.4, 84.9 %, with 5.5 to 67.4 million parameters. Its recipe is unknown to
us, as configs/imagenet.py says.

full: 8 members of 350 epochs. Cost: 1.25 days of 8 v5e chips for H1, by the plan in the README,
and by multiply-adds (`python -m halonet.models list`) 0.8 times that for H0 to 37 times for H7.
smoke: 7 members with one seed.
"""

from configs import imagenet
from experiments import bases


def get_config(scale="full"):
    """What the members have in common: the recipe of H0, or halonet_tiny on digits."""
    if scale == "full":
        return imagenet.get_config("halonet_h0")
    return bases.get_config(scale)


def sweep(scale="full"):
    """Yields a member for each size."""
    if scale == "full":
        for variant in imagenet.VARIANTS:
            config = imagenet.get_config(variant)
            yield {
                "name": variant.removeprefix("halonet_"),
                "model.name": variant,
                "model.drop_path": config.model.drop_path,
                "model.dropout": config.model.dropout,
                "data.image_size": config.data.image_size,
                "augment.rand_augment": config.augment.rand_augment,
            }
        return
    # w32d3 is halonet_tiny itself.
    for width, depth in ((8, 1), (16, 1), (16, 3), (24, 3), (32, 3), (32, 5), (48, 5)):
        yield {
            "name": f"w{width}d{depth}",
            "model.widths": (width, 2 * width),
            "model.depths": (1, depth),
        }
