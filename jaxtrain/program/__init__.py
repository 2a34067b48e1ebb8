"""An experiment assembled on a mesh: its data opened, its values checked, its functions ready to compile."""

from jaxtrain.program.assembly import abstract_state, assemble
from jaxtrain.program.cadence import Cadence
from jaxtrain.program.program import Program, Split

__all__ = ["Cadence", "Program", "Split", "abstract_state", "assemble"]
