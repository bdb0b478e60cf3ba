"""The dynamics of training: how noisy gradients are, how sharp the loss along updates, how leaves differ."""

from hessjax.analysis.dynamics._heterogeneity import Heterogeneity as Heterogeneity
from hessjax.analysis.dynamics._heterogeneity import heterogeneity as heterogeneity
from hessjax.analysis.dynamics._moments import NoiseScale as NoiseScale
from hessjax.analysis.dynamics._noise import critical_batch_size as critical_batch_size
from hessjax.analysis.dynamics._noise import noise_scale as noise_scale
from hessjax.analysis.dynamics._noise import noise_scale_from_norms as noise_scale_from_norms
from hessjax.analysis.dynamics._sharpness import CriticalSharpness as CriticalSharpness
from hessjax.analysis.dynamics._sharpness import critical_sharpness as critical_sharpness
from hessjax.analysis.dynamics._sharpness import directional_sharpness as directional_sharpness
