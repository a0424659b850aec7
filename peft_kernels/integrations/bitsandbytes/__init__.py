"""bitsandbytes' own layers and optimizers, served by our kernels once `enable()` has been called."""

from .ops import disable, enable, enable_if_asked, unpack

__all__ = ["disable", "enable", "enable_if_asked", "unpack"]
