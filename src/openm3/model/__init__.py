"""The network as single-device modules; parallelism and engines wrap it from outside."""

from openm3.model.cache import KVCache, LayerCache
from openm3.model.m3 import M3, M3Output, plan_args

__all__ = ["M3", "KVCache", "LayerCache", "M3Output", "plan_args"]
