"""The experts that are hit: gate, up and SiLU, then down."""
