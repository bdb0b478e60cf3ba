"""From a loss to a matvec: Hessians, Gauss–Newton and Fisher matrices, batches, parts of the params."""
