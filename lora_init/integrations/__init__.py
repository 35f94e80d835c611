"""Hosts that carry adapted layers; one file each."""
