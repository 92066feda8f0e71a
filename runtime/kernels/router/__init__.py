"""The whole router of a layer."""
