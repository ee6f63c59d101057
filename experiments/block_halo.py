"""How large should a block be, and how large its halo?

    python -m experiments run block_halo_smoke --jobs=2

A query sees the block that it is in and the halo around that, (b+2h)^2 keys. A larger halo shows
each query more. A larger block computes the same window for more queries at once, and gives up
more of what a convolution has: that all pixels see alike. The pairs b4h3 and b8h1, b4h5 and b8h3
see windows of the same size from blocks of different ones.

The paper: relaxing equivariance from pixels to blocks improves accuracy (verified, as quoted in
two places); the numbers of its sweep are unknown to us, and that h = 0 is worse is a recollection.

full: H1 on ImageNet at 256 px, whose last map of 8 px has no room for larger blocks; 8 members of
100 epochs. Cost: about 0.36 days of 8 v5e chips for a member such as H1, by the plan in the README
(109,475 steps in 1.25 days), more with larger windows; `--mode=plan` tells of each.
smoke: halonet_tiny on digits, maps of 16 and 8 px; 5 members with 3 seeds each, 15 runs.
"""

from experiments import bases


def get_config(scale="full"):
    """H1 on ImageNet, or halonet_tiny on digits."""
    return bases.get_config(scale)


def sweep(scale="full"):
    """Yields a member for each pair of block and halo."""
    pairs = [(4, 1), (4, 3), (4, 5), (8, 0), (8, 1), (8, 2), (8, 3), (8, 4)]
    if scale == "smoke":
        pairs = [(2, 1), (4, 0), (4, 1), (4, 2), (8, 1)]
    members = (
        {"name": f"b{block}h{halo}", "model.block_size": block, "model.halo_size": halo}
        for block, halo in pairs
    )
    yield from bases.with_seeds(scale, members)
