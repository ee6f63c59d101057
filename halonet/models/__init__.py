"""HaloNets and their layers: Flax linen modules and the registry of named variants."""

from halonet.models.attention import HaloAttention
from halonet.models.halonet import HaloNet
from halonet.models.registry import VARIANTS, create_model, list_models

__all__ = ["VARIANTS", "HaloAttention", "HaloNet", "create_model", "list_models"]
