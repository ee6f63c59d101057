"""HaloNets and their layers: Flax linen modules and the registry of named variants."""

from halonet.models.attention import HaloAttention
from halonet.models.halonet import HaloNet
from halonet.models.initial import SCHEMES, init_function
from halonet.models.inside import attention_layers, attention_map, receptive_field
from halonet.models.registry import VARIANTS, Variant, create_model, list_models
from halonet.models.tables import resize_tables

__all__ = [
    "SCHEMES",
    "VARIANTS",
    "HaloAttention",
    "HaloNet",
    "Variant",
    "attention_layers",
    "attention_map",
    "create_model",
    "init_function",
    "list_models",
    "receptive_field",
    "resize_tables",
]
