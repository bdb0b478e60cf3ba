"""What a weight is worth: rules that score weights."""

from hessjax.pruning.saliencies._drop_and_grow import rigl as rigl
from hessjax.pruning.saliencies._drop_and_grow import sparse_evolution as sparse_evolution
from hessjax.pruning.saliencies._first_order import gradient as gradient
from hessjax.pruning.saliencies._first_order import magnitude as magnitude
from hessjax.pruning.saliencies._first_order import random as random
from hessjax.pruning.saliencies._first_order import static as static
from hessjax.pruning.saliencies._hard_concrete import hard_concrete as hard_concrete
from hessjax.pruning.saliencies._layerwise import obc as obc
from hessjax.pruning.saliencies._layerwise import sparsegpt as sparsegpt
from hessjax.pruning.saliencies._movement import from_magnitudes as from_magnitudes
from hessjax.pruning.saliencies._movement import movement as movement
from hessjax.pruning.saliencies._movement import soft_movement as soft_movement
from hessjax.pruning.saliencies._obs import obd as obd
from hessjax.pruning.saliencies._obs import obs as obs
from hessjax.pruning.saliencies._obs import wood_taylor as wood_taylor
from hessjax.pruning.saliencies._saliency import Context as Context
from hessjax.pruning.saliencies._saliency import Saliency as Saliency
from hessjax.pruning.saliencies._saliency import compensated as compensated
from hessjax.pruning.saliencies._wanda import wanda as wanda
