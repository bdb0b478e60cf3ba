"""Loss and model functions from Flax models, linen and nnx: pure, hashable, equal when of equal parts.

What a model mutates or draws (batch statistics, dropout keys) enters the loss through its arguments, so
the loss is one fixed function of the weights. Two losses made of equal parts compare equal: building one
again for the next checkpoint hits the compiled code of the last.
"""

from hessjax.flax._batch_norm import linen_recalibrate as linen_recalibrate
from hessjax.flax._batch_norm import nnx_recalibrate as nnx_recalibrate
from hessjax.flax._linen import Inputs as Inputs
from hessjax.flax._linen import OutputLoss as OutputLoss
from hessjax.flax._linen import linen_loss as linen_loss
from hessjax.flax._linen import linen_model as linen_model
from hessjax.flax._nnx import NnxLoss as NnxLoss
from hessjax.flax._nnx import NnxModel as NnxModel
from hessjax.flax._nnx import nnx_loss as nnx_loss
from hessjax.flax._nnx import nnx_model as nnx_model
from hessjax.flax._resized import LinenResized as LinenResized
from hessjax.flax._resized import Width as Width
from hessjax.flax._resized import linen_resized as linen_resized
from hessjax.flax._resized import nnx_resized as nnx_resized
