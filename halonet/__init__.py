"""HaloNet in JAX and Flax: blocked local self-attention with halos, exact and fast."""

from halonet.models import HaloAttention, HaloNet, create_model, list_models
from halonet.ops import halo_attention

__version__ = "0.1.0"
__all__ = [
    "HaloAttention",
    "HaloNet",
    "create_model",
    "halo_attention",
    "list_models",
    "load_run",
]


def load_run(workdir, step="best", *, weights="", sharding=None, **overrides):
    """Restores a run: see `halonet.run.load_run`."""
    # Here and not above: Orbax takes seconds to import, and few programs restore.
    from halonet.run import load_run

    return load_run(workdir, step, weights=weights, sharding=sharding, **overrides)
