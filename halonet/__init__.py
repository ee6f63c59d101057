"""HaloNet in JAX and Flax: blocked local self-attention with halos, exact and fast."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from halonet.exported import load_export
    from halonet.models import HaloAttention, HaloNet, create_model, list_models
    from halonet.ops import halo_attention
    from halonet.run import load_run

__version__ = "0.1.0"
__all__ = [
    "HaloAttention",
    "HaloNet",
    "create_model",
    "halo_attention",
    "list_models",
    "load_export",
    "load_run",
]

_MODULES = ("models", "ops", "run")
_HOMES = {
    "halo_attention": "halonet.ops",
    "load_export": "halonet.exported",
    "load_run": "halonet.run",
}


def __getattr__(name: str) -> typing.Any:
    """Imports a public name, or the module of one, when it is first asked for.

    The processes that make batches use this package without JAX, and few programs need Orbax.
    """
    if name in _MODULES:
        return importlib.import_module(f"halonet.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'halonet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "halonet.models")), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES, *__all__]
