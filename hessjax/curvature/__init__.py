"""From a loss, params and data to a matvec."""
