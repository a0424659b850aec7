"""Our kernels behind bitsandbytes' own layers and optimizers, after `enable()`."""

from .ops import disable, enable, enable_if_asked, unpack

__all__ = ["disable", "enable", "enable_if_asked", "unpack"]
