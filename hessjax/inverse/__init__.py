"""A curvature matrix's inverse: damped linear systems."""
