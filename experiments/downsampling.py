"""Should attention halve a map by fewer queries, or by pooling what all queries found?

    python -m experiments run downsampling_smoke --jobs=2

HaloNet's stages begin with attention of which only every second query, in each direction, is
computed; the stand-alone self-attention before it computed all of them and averaged 2x2 outputs.
The members are these two, and a model that leaves halving to strided convolutions, as a measure of
what either costs.

The paper: subsampled queries take several times fewer operations at about the same accuracy
(verified, by a note of a reader); its numbers are unknown to us.

full: H1 on ImageNet at 256 px, 3 members of 100 epochs. Cost: about 0.36 days of 8 v5e chips for
the first, by the plan in the README (109,475 steps in 1.25 days), more for pooling; `--mode=plan`
tells of each.
smoke: halonet_tiny on digits, in which one block halves; 3 members with 3 seeds each, 9 runs.
"""

from experiments import bases


def get_config(scale="full"):
    """H1 on ImageNet, or halonet_tiny on digits."""
    return bases.get_config(scale)


def sweep(scale="full"):
    """Yields a member for each way of halving a map."""
    # The blocks of each stage, of which the first of all but the first stage halves.
    plan = "h/chh/chhhhhhhhh/chh" if scale == "full" else "h/chh"
    members = (
        {"name": "queries", "model.downsample": "queries"},
        {"name": "pool", "model.downsample": "pool"},
        {"name": "convolution", "model.plan": plan},
    )
    yield from bases.with_seeds(scale, members)
