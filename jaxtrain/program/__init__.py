"""An experiment assembled on a mesh: open data, checked values, jitted steps."""

from jaxtrain.program.assembly import abstract_state, assemble
from jaxtrain.program.cadence import Cadence
from jaxtrain.program.program import Program, Split

__all__ = ["Cadence", "Program", "Split", "abstract_state", "assemble"]
