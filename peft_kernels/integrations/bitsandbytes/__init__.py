"""Runs bitsandbytes' own layers and optimizers on our kernels, after `enable()`."""

from .ops import disable, enable, enable_if_asked, unpack

__all__ = ["disable", "enable", "enable_if_asked", "unpack"]
