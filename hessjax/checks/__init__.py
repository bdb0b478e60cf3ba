"""The self-test of a loss, its data and its matvec."""
