"""From a matvec to solutions of linear systems."""
