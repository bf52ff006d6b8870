"""Copies of a model on the devices of a Ray cluster, which share the samples of a run among them."""

from focuslens.model.cluster.pool import RayPool

__all__ = ["RayPool"]
