"""Weights from and to other programs: timm and MindCV. `python -m halonet.models.convert`."""
