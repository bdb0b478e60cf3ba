"""Layers of any network: what goes into them, what comes back, and what is built from both."""

from hessjax.layers._capture import Capture as Capture
from hessjax.layers._capture import capture as capture
from hessjax.layers._coverage import Coverage as Coverage
from hessjax.layers._coverage import coverage as coverage
from hessjax.layers._kfac import ekfac as ekfac
from hessjax.layers._kfac import kfac as kfac
from hessjax.layers._kronecker import Kronecker as Kronecker
from hessjax.layers._moments import LayerMoments as LayerMoments
from hessjax.layers._moments import moments as moments
from hessjax.layers._quality import Quality as Quality
from hessjax.layers._quality import quality as quality
from hessjax.layers._reconstruct import Rebuilt as Rebuilt
from hessjax.layers._reconstruct import Reconstruction as Reconstruction
from hessjax.layers._reconstruct import reconstruct as reconstruct
