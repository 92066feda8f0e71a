"""Residual scaling and the norm behind it."""
