"""What the server did, in Prometheus' text format. Labels are routes and status codes, never anything a client chose."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from orthus.serving import Engine

SECONDS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
GAUGES = {
    "running": "requests that are being answered",
    "waiting": "requests in the queue",
    "latents_per_second": "latents drawn per second, of the last minute",
    "tokens_per_second": "tokens written per second, of the last minute",
}
COUNTERS = {"served": "requests answered", "cancelled": "requests that nobody waited for", "failed": "requests that failed"}


class Metrics:
    """A registry of its own, so that several applications may live in one process."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        self.requests = Counter("orthus_http_requests", "HTTP requests", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "orthus_http_seconds", "seconds per HTTP request", ("route",), registry=self.registry, buckets=SECONDS
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def observe(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self.engine.stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"orthus_engine_{name}", text, value=getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"orthus_engine_{name}", text, value=getattr(stats, name))

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
