"""Attention of a block of slots over the cached keys, which are read once for all of them."""
