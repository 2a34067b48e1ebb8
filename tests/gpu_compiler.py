"""Skip a test where XLA's GPU compiler is not installed."""

from __future__ import annotations

import pytest

from jaxtrain.sharding import described

needs_compiler = pytest.mark.skipif(
    described.compiler_problem() is not None,
    reason="needs the extra gpu-compile: pip install 'jaxtrain[gpu-compile]'",
)
