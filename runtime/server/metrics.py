"""`Metrics`: what the server counts, in Prometheus' form, and how it is. Knows no model.

What vLLM counts too has vLLM's name after ours: `specbound_num_requests_running` is its `vllm:num_requests_running`.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.server.worker import Worker
from runtime.stats import SpeculationStats

# Bounds of seconds of a request, and of seconds from token to token; of rows of a round.
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """Counts of one server, from its start."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self._gauge("ready", "1 once the exactness probe has passed.").set_function(
            lambda: float(worker.state == "ready")
        )
        self._gauge("num_requests_waiting", "Answers that wait.").set_function(lambda: worker.num_waiting)
        self._gauge("num_requests_running", "Answers being made.").set_function(lambda: worker.num_running)
        self._gauge("kv_cache_usage_perc", "Part of the KV blocks that answers have taken, 0 to 1.").set_function(
            lambda: worker.memory.usage
        )
        self._gauge("kv_blocks", "KV blocks that there are.").set_function(lambda: worker.memory.blocks)
        self._gauge("kv_blocks_used", "KV blocks that answers have taken.").set_function(lambda: worker.memory.used)
        text = "Answers put out for want of KV blocks, to be resumed."
        self.preemptions = self._counter("num_preemptions", text)
        self.requests = self._counter("requests", "Requests by how they ended.", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.queries = self._counter("prefix_cache_queries", "Tokens of prompts that were looked for.")
        self.hits = self._counter("prefix_cache_hits", "Tokens of prompts that were read for another answer.")
        self.tokens = self._counter("generation_tokens", "Tokens generated.")
        self.rounds = self._counter("rounds", "Verification passes of the target, those of each answer.")
        self.resting = self._counter("resting_rounds", "Those in which nothing was drafted because it did not pay.")
        self.drafted = self._counter("drafted_tokens", "Drafts by exit layer; 0 is the lookup.", "exit_layer")
        self.accepted = self._counter("accepted_tokens", "Accepted drafts by exit layer.", "exit_layer")
        self.generating = self._counter("generating_seconds", "Time in which the model worked.")
        name = "time_to_first_token_seconds"
        self.first_token = self._histogram(name, "From request to first token, queue included.", SECONDS)
        name = "inter_token_latency_seconds"
        self.between = self._histogram(name, "From token to token of an answer; 0 within a round.", SHORT_SECONDS)
        name = "e2e_request_latency_seconds"
        self.seconds = self._histogram(name, "From request to its end, queue included.", SECONDS)
        name = "iteration_tokens_total"
        self.rows = self._histogram(name, "Rows of a round: newest tokens of all answers, and drafts.", ROWS)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"specbound_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"specbound_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"specbound_{name}", text, buckets=bounds, registry=self.registry)

    def record(self, prompt_tokens: int, stats: SpeculationStats) -> None:
        """Add one call of `generate`."""
        self.prompt_tokens.inc(prompt_tokens)
        self.queries.inc(prompt_tokens)
        self.hits.inc(stats.reused)
        self.tokens.inc(stats.emitted)
        self.rounds.inc(stats.rounds)
        self.resting.inc(stats.resting_rounds)
        self.generating.inc(stats.seconds)
        for layer, count in stats.drafted.items():
            self.drafted.labels(layer).inc(count)
        for layer, count in stats.accepted.items():
            self.accepted.labels(layer).inc(count)

    def round(self, rows: int, preempted: int) -> None:
        """Add one round: its rows, and how many answers were put out before it."""
        self.rows.observe(rows)
        self.preemptions.inc(preempted)

    def page(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
