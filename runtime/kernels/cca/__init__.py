"""Compressed convolutional attention between the projections and the attention: one launch."""
