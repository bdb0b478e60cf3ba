"""From a matvec to numbers: eigenpairs, trace, density."""
