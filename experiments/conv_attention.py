"""Which stages should be convolutional, and which have attention?

    python -m experiments run conv_attention_smoke --jobs=2

Early maps are large, so that attention costs most there, and what it finds may be what a 3x3
convolution finds as well. The members differ in the kind of block that each stage has: c is a
convolution, h halo attention.

The paper (verified, as transcribed by keras_cv_attention_models) has this of H7: attention
everywhere 84.9 % top-1 at a training time of 1.9 (EfficientNet-B7's is 1.0); convolutions in stage
1 84.6 at 1.4; in 1 and 2 84.7 at 1.0; in 1 to 3 83.8 at 0.5. That all four had about 67 million
parameters is a recollection; here widths stay, so that convolutions in late stages add parameters,
and the report has both.

full: H1 on ImageNet at 256 px, 5 members of 100 epochs; for H7 itself see configs/imagenet.py.
Cost: about 0.36 days of 8 v5e chips for the member with attention everywhere, by the plan in the
README (109,475 steps in 1.25 days), less for the others; `--mode=plan` tells of each.
smoke: halonet_tiny, which has two stages, on digits; 4 members with 3 seeds each, 12 runs.
"""

from experiments import bases


def get_config(scale="full"):
    """H1 on ImageNet, or halonet_tiny on digits."""
    return bases.get_config(scale)


def sweep(scale="full"):
    """Yields a member for each plan."""
    plans = ["h/h/h/h", "c/h/h/h", "c/c/h/h", "c/c/c/h", "c/c/c/c"]
    if scale == "smoke":
        plans = ["h/h", "c/h", "h/c", "c/c"]
    members = ({"name": plan.replace("/", ""), "model.plan": plan} for plan in plans)
    yield from bases.with_seeds(scale, members)
