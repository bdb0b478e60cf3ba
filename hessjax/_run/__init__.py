"""The Estimator protocol, the two loops that drive one, and what may watch them."""
