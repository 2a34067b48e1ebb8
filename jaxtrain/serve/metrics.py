"""Counts and times of the service for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
EXAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics of one service, in a registry of its own.

    Args:
      waiting: returns the number of examples that wait for a batch.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ["endpoint", "code"]
        self._requests = Counter("jaxtrain_requests", "Requests answered.", labels, registry=registry)
        self._seconds = Histogram(
            "jaxtrain_request_seconds",
            "Time from a request's head to its response.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self._examples = Histogram(
            "jaxtrain_batch_examples", "Examples in a batch.", buckets=EXAMPLES, registry=registry
        )
        self._batch_seconds = Histogram(
            "jaxtrain_batch_seconds", "Time of the model for a batch.", buckets=SECONDS, registry=registry
        )
        queue = Gauge("jaxtrain_queue_examples", "Examples that wait for a batch.", registry=registry)
        queue.set_function(waiting)
        self.ready = Gauge("jaxtrain_ready", "1 when the model is warm.", registry=registry)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def batch(self, rows: int, seconds: float) -> None:
        """Count a batch."""
        self._examples.observe(rows)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
