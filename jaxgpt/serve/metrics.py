"""The server's metrics, in the text format of Prometheus."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

disable_created_metrics()  # a time series with the start time for every other series

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""The upper bounds of the histograms' buckets."""


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        stats: Returns the current statistics of the engine: counters, whose names end with
            `_total`, and gauges.
    """

    def __init__(self, stats: Callable[[], Mapping[str, float]] = dict) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineStats(stats))
        self.responses = Counter(
            "jaxgpt_http_responses_total",
            "HTTP responses by path and status.",
            ("path", "status"),
            registry=registry,
        )
        self.finished = Counter(
            "jaxgpt_finished_total",
            "Generated texts by finish reason.",
            ("reason",),
            registry=registry,
        )
        # Both are measured from when a call's body has been parsed.
        self.first = Histogram(
            "jaxgpt_first_token_seconds", "Time to first token.", buckets=SECONDS, registry=registry
        )
        self.total = Histogram(
            "jaxgpt_answer_seconds",
            "Time to the end of the answer.",
            buckets=SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """Renders all metrics in the format of `MEDIA_TYPE`."""
        return generate_latest(self._registry)


class _EngineStats(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for name, value in self._stats().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(f"jaxgpt_{name}", f"Engine: {name.replace('_', ' ')}.", value)
