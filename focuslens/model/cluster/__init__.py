"""Copies of a model on the devices of a Ray cluster. The samples of a run are divided among the copies."""

from focuslens.model.cluster.ray_pool import RayPool

__all__ = ["RayPool"]
