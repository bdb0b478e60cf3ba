"""Which weights go together."""

from hessjax.pruning.patterns._heads import heads as heads
from hessjax.pruning.patterns._pattern import Pattern as Pattern
from hessjax.pruning.patterns._pattern import unstructured as unstructured
from hessjax.pruning.patterns._patterns import blocks as blocks
from hessjax.pruning.patterns._patterns import channels as channels
from hessjax.pruning.patterns._patterns import filters as filters
from hessjax.pruning.patterns._patterns import n_of_m as n_of_m
from hessjax.pruning.patterns._patterns import rows as rows
