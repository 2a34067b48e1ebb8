"""The verbs, a thin file each. What they do is told here, where ``--help`` need import none of them."""

SUMMARIES = {
    "run": "train an experiment, or go on with it (the same as python -m jaxtrain.run)",
    "plan": "memory, arithmetic and communication of a run, and what fits, before it runs",
    "verify": "proves that a run which is killed goes on exactly, or that two meshes train alike",
    "prepare": "fetch a data set, or import its files with --from",
    "evaluate": "test accuracy, precision, recall and F1 of a run's checkpoint",
    "sample": "text from a run's language model",
    "bench": "throughput of a training step by number of devices, or what --deterministic costs",
    "doctor": "versions, devices, disk, data folder, and a one-step smoke test",
}
