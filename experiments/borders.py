"""Should what lies outside the image be keys of zeros, or be masked?

    python -m experiments run borders_smoke --jobs=2

The halo of a block at the border reaches out of the image. With "zeros" there are keys and values
of zero, which take part in the softmax by their positions; with "mask" they have no weight.

The paper's choice is unknown to us. timm, keras_cv_attention_models and MindCV have zeros without
a mask, lucidrains masks (verified); the sentence of the paper that non-masked attention is better
is about windows of blocks instead of pixels, not about this.

full: H1 on ImageNet at 256 px, 2 members of 100 epochs. Cost: about 0.36 days of 8 v5e chips for
each, by the plan in the README (109,475 steps in 1.25 days).
smoke: halonet_tiny on digits; 2 members with 3 seeds each, 6 runs. Most of what lies at the border
of a digit is empty anyway, so that little can come of it there.
"""

from experiments import bases


def get_config(scale="full"):
    """H1 on ImageNet, or halonet_tiny on digits."""
    return bases.get_config(scale)


def sweep(scale="full"):
    """Yields a member for each border."""
    members = ({"name": border, "model.border": border} for border in ("zeros", "mask"))
    yield from bases.with_seeds(scale, members)
