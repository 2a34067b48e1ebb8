"""The commands, one module each. Their summaries are here, so that ``--help`` imports no command."""

SUMMARIES = {
    "run": "train an experiment or resume its run, evaluate and save",
    "sweep": "train many seeds and settings, and compare them",
    "plan": "memory, FLOPs and communication of a run, and which meshes fit, without running it",
    "runs": "list, filter and compare runs, tag them, and free disk of old checkpoints",
    "verify": "check that a killed run resumes bit-for-bit, or that two meshes train the same",
    "prepare": "download a data set, or import its files with --from",
    "evaluate": "exact metrics of a run's checkpoint, and the figures of its task",
    "explain": "what predictions of a run's model depend on, as pictures on an HTML page",
    "report": "runs as one HTML page: curves, results, settings, mistakes; or a page that follows them",
    "sample": "generate text with a run's language model",
    "export": "write a run's model as one file that runs without the experiment's code",
    "predict": "predictions of an exported model for images, arrays, tables and text",
    "serve": "an exported model as an HTTP service, with a page to try it",
    "track": "send the records of a run to W&B, MLflow or a tracker of your own",
    "bench": "throughput of a training step by number of devices",
    "doctor": "versions, devices, disk, data folder, and a one-step smoke test",
}
