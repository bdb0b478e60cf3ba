"""Figures of curvature and pruning results, for notebooks and reports (`pip install 'hessjax[plots]'`).

Every function draws on the axes it is given, or on a new figure, and returns the axes. Styles are set for the
new figure only; the global `rcParams` stay as they are.
"""

from hessjax.plot.loss import landscape as landscape
from hessjax.plot.loss import landscape_surface as landscape_surface
from hessjax.plot.pruning import accuracy_left as accuracy_left
from hessjax.plot.pruning import kept as kept
from hessjax.plot.pruning import pruning_run as pruning_run
from hessjax.plot.pruning import sensitivity as sensitivity
from hessjax.plot.spectrum import cumulative as cumulative
from hessjax.plot.spectrum import density as density
from hessjax.plot.spectrum import layers as layers
from hessjax.plot.training import eigenvalues_over_training as eigenvalues_over_training
