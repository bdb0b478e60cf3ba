"""From gradients to the damped inverse of the Fisher matrix."""
