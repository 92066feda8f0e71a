"""Devices: profiles, probes and fingerprints. The lowest package: it imports nothing local."""
