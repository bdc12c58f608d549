"""The server's metrics, in the text format of Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

# The upper bounds of the histograms' buckets.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Histogram:
    """A histogram of durations in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        """Yields the lines of a Prometheus histogram: its buckets, sum and count."""
        total = 0
        for bound, count in zip((*SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """The counters and histograms of a server; not thread-safe."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        """HTTP responses by path and status."""
        self.finished: Counter[str] = Counter()
        """Generated texts by finish reason."""
        self.first = Histogram()
        """Time to first token: from a call's parsed request to its first token."""
        self.total = Histogram()
        """Latency: from a call's parsed request to the end of its answer."""

    def text(self, stats: Mapping[str, float]) -> str:
        """Renders all metrics as text; `stats` are those of the engine."""
        lines: list[str] = []

        def family(name: str, kind: str, about: str, samples: Iterable[str]) -> None:
            lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples))

        for stat, value in stats.items():
            name, kind = f"jaxgpt_{stat}", "counter" if stat.endswith("_total") else "gauge"
            family(name, kind, f"Engine: {stat.replace('_', ' ')}.", [f"{name} {value}"])
        name = "jaxgpt_http_responses_total"
        samples = [
            f'{name}{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.responses.items())
        ]
        family(name, "counter", "HTTP responses by path and status.", samples)
        name = "jaxgpt_finished_total"
        samples = [
            f'{name}{{reason="{reason}"}} {count}'
            for reason, count in sorted(self.finished.items())
        ]
        family(name, "counter", "Generated texts by finish reason.", samples)
        name = "jaxgpt_first_token_seconds"
        family(name, "histogram", "Time to first token.", self.first.lines(name))
        name = "jaxgpt_answer_seconds"
        family(name, "histogram", "Time to the end of the answer.", self.total.lines(name))
        return "\n".join(lines) + "\n"
