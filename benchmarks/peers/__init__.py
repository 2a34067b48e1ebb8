"""The same training in other libraries: ``python -m benchmarks.peers`` times it."""
