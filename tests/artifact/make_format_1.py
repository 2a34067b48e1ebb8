#!/usr/bin/env python3
"""Write tests/golden/artifacts/format1.jaxtrain and its outputs.

Run once: ``python tests/artifact/make_format_1.py`` in the root folder, with tests/ on PYTHONPATH. The files
stay as the version that wrote them left them, so that the tests show that later versions load them.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import tiny
from artifact_cases import make_trained

from jaxtrain import artifact, models
from jaxtrain.export import write
from jaxtrain.export.trained import model_outputs

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "artifacts"


def main() -> int:
    """Write the artifact and the outputs of the model that it was made of; returns the exit code."""
    path = FOLDER / "format1.jaxtrain"
    model = models.CNN(widths=(4,), convs=1, classes=4)
    trained = make_trained(dataclasses.replace(tiny.EXPERIMENT, model=model))
    FOLDER.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(write.write("jaxtrain", path, trained, force=True) + "\n")
    outputs = model_outputs(trained)
    record = {
        "image": np.asarray(trained.examples["image"]).tolist(),
        "probability": np.asarray(outputs["probability"]).round(7).tolist(),
        "label": outputs["label"].tolist(),
        "versions": dict(artifact.load(path).manifest.versions),
    }
    (FOLDER / "format1.json").write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
