"""The ground: what a state, a batch and a model are; errors; and this process (cache, signals, files)."""
