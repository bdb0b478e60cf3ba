"""Which weights go together."""

from hessjax.pruning.patterns._by_path import heads as heads
from hessjax.pruning.patterns._pattern import Pattern as Pattern
from hessjax.pruning.patterns._pattern import blocks as blocks
from hessjax.pruning.patterns._pattern import channels as channels
from hessjax.pruning.patterns._pattern import filters as filters
from hessjax.pruning.patterns._pattern import n_of_m as n_of_m
from hessjax.pruning.patterns._pattern import rows as rows
from hessjax.pruning.patterns._pattern import unstructured as unstructured
