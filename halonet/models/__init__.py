"""HaloNets and their layers: Flax linen modules and the registry of named variants."""

from halonet.models.attention import HaloAttention
from halonet.models.halonet import HaloNet
from halonet.models.initial import SCHEMES, init_function
from halonet.models.registry import VARIANTS, Variant, create_model, list_models
from halonet.models.tables import resize_tables

__all__ = [
    "SCHEMES",
    "VARIANTS",
    "HaloAttention",
    "HaloNet",
    "Variant",
    "create_model",
    "init_function",
    "list_models",
    "resize_tables",
]
