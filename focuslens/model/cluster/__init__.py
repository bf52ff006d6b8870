"""Copies of a model on the devices of a Ray cluster, which share the samples of a run."""

from focuslens.model.cluster.ray_pool import RayPool

__all__ = ["RayPool"]
