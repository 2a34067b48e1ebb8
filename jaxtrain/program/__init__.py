"""An experiment assembled on a mesh: its data opened, its values checked, its functions ready to compile."""

from jaxtrain.program.program import Program, Split, abstract_state, assemble

__all__ = ["Program", "Split", "abstract_state", "assemble"]
