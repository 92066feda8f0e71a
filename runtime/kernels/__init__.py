"""Kernels of the fused forward: a folder each, with a plain reference, the Triton kernel, its tilings and inputs."""
