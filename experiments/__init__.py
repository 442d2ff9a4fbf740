"""Experiments on gradstats: one training loop, its configuration, and the studies built on it."""
