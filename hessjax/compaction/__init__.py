"""Physically smaller networks, and sparse files."""
