"""`Metrics`: what the server counts, in Prometheus' form. Knows no model."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.stats import SpeculationStats

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of one server, from its start.

    Args:
        ready: whether the model takes requests.
        waiting: how many answers wait.
        running: at how many the model works.
    """

    def __init__(self, ready: Callable[[], bool], waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        Gauge("specbound_ready", "1 once the exactness probe has passed.", registry=self.registry).set_function(
            lambda: float(ready())
        )
        Gauge("specbound_waiting_requests", "Answers in the queue.", registry=self.registry).set_function(waiting)
        Gauge("specbound_running_requests", "Answers being made.", registry=self.registry).set_function(running)
        self.requests = self._counter("requests", "Requests by how they ended.", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.tokens = self._counter("generated_tokens", "Tokens generated.")
        self.rounds = self._counter("rounds", "Verification passes of the target.")
        self.drafted = self._counter("drafted_tokens", "Drafts by exit layer; 0 is the lookup.", "exit_layer")
        self.accepted = self._counter("accepted_tokens", "Accepted drafts by exit layer.", "exit_layer")
        self.generating = self._counter("generating_seconds", "Time in which the model worked.")
        self.first_token = self._histogram("first_token_seconds", "From request to first token, queue included.")
        self.seconds = self._histogram("request_seconds", "From request to its end, queue included.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"specbound_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"specbound_{name}", text, buckets=SECONDS, registry=self.registry)

    def record(self, prompt_tokens: int, stats: SpeculationStats) -> None:
        """Add one call of `generate`."""
        self.prompt_tokens.inc(prompt_tokens)
        self.tokens.inc(stats.emitted)
        self.rounds.inc(stats.rounds)
        self.generating.inc(stats.seconds)
        for layer, count in stats.drafted.items():
            self.drafted.labels(layer).inc(count)
        for layer, count in stats.accepted.items():
            self.accepted.labels(layer).inc(count)

    def page(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
