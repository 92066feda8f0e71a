"""The fused forward's operators for CPUs, in C."""
