"""What predictions depend on: attribution methods as pure functions, and ``explain`` for trained models."""

from jaxtrain.explain.attribution import (
    attention_rollout,
    completeness_error,
    grad_cam,
    integrated_gradients,
    smoothgrad,
)

__all__ = ["attention_rollout", "completeness_error", "grad_cam", "integrated_gradients", "smoothgrad"]
