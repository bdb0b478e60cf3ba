"""Figures of curvature and pruning results, for notebooks and reports (`pip install 'hessjax[plots]'`).

Every function draws on the axes it is given, or on a new figure, and returns the axes. Styles are set for the
new figure only; the global `rcParams` stay as they are.
"""

from hessjax.plot._loss import landscape as landscape
from hessjax.plot._loss import landscape_surface as landscape_surface
from hessjax.plot._pruning import accuracy_left as accuracy_left
from hessjax.plot._pruning import kept as kept
from hessjax.plot._pruning import pruning_run as pruning_run
from hessjax.plot._pruning import sensitivity as sensitivity
from hessjax.plot._spectrum import cumulative as cumulative
from hessjax.plot._spectrum import density as density
from hessjax.plot._spectrum import eigenvalues_over_training as eigenvalues_over_training
from hessjax.plot._spectrum import layers as layers
