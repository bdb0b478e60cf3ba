"""Pruning: scores, masks, and training under a mask."""
