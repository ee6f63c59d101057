"""Do relative positions matter, and does it matter how they are counted?

    python -m experiments run positions_smoke --jobs=2

"exact" tables have a row for each offset in pixels between a key and a query. "contiguous" ones, as
timm and MindCV have them, count the queries that subsampling has left as though they were
neighbours, so that what a row stands for depends on the query; at stride 1 both are the same.
"none" leaves positions out: a query knows what its keys are and not where.

The paper has relative positions in its equation (recollection), and its parameter counts need their
tables: without them H5 has 30.6 million (computed) where it has 30.7. Which way of counting it used
is unknown, and so is any ablation of it.

full: H1 on ImageNet at 256 px, 3 members of 100 epochs. Cost: about 0.36 days of 8 v5e chips for
each, by the plan in the README (109,475 steps in 1.25 days).
smoke: halonet_tiny on digits, in which one block subsamples; 3 members with 3 seeds each, 9 runs.
"""

from experiments import bases


def get_config(scale="full"):
    """H1 on ImageNet, or halonet_tiny on digits."""
    return bases.get_config(scale)


def sweep(scale="full"):
    """Yields a member for each way of counting."""
    members = (
        {"name": positions, "model.positions": positions}
        for positions in ("exact", "contiguous", "none")
    )
    yield from bases.with_seeds(scale, members)
