"""One thin file for each verb of ``python -m jaxtrain``."""
