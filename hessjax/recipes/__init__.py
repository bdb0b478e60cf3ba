"""Pruning recipes in YAML."""
