"""Pruning during training: a wrapper round any optax optimizer."""
