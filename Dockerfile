# The CUDA image that scripts/jobset.yaml runs: registry.example/jaxtrain:latest
#
#   docker build --tag registry.example/jaxtrain:latest .
#   docker run --rm --gpus all registry.example/jaxtrain:latest python -m jaxtrain doctor
#
# CUDA, cuDNN and NCCL come with the JAX wheels, so a plain Python base is enough. The node needs an NVIDIA driver for
# CUDA 12 and the NVIDIA container toolkit; with a driver for CUDA 13: --build-arg CUDA=cuda13.
# Python 3.11 is the version that scripts/constraints-3.11.txt pins.
FROM python:3.11-slim

ARG CUDA=cuda12

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# A user with a home folder: the compile cache goes to ~/.cache/jaxtrain.
RUN useradd --create-home --uid 1000 jaxtrain

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY scripts/constraints-3.11.txt scripts/
COPY jaxtrain jaxtrain
COPY experiments experiments

# JAX reads the addresses of the other pods through the package kubernetes (--distributed auto).
RUN python -m pip install --constraint scripts/constraints-3.11.txt ".[${CUDA}]" kubernetes==37.0.2

USER 1000:1000
WORKDIR /home/jaxtrain

CMD ["python", "-m", "jaxtrain", "doctor"]
