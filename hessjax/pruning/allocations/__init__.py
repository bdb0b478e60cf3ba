"""How zeros are spread over the leaves."""

from hessjax.pruning.allocations._allocation import Allocation as Allocation
from hessjax.pruning.allocations._allocation import global_threshold as global_threshold
from hessjax.pruning.allocations._allocation import uniform as uniform
from hessjax.pruning.allocations._densities import by_curvature as by_curvature
from hessjax.pruning.allocations._densities import erdos_renyi as erdos_renyi
from hessjax.pruning.allocations._densities import explicit as explicit
from hessjax.pruning.allocations._threshold import threshold as threshold
