"""`/metrics`: what the server does, for Prometheus. No metric says anything about what was asked."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foveal.engine import RequestOutput
from foveal.server.worker import EngineState

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server; an `Observer` of its worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "A request's mean time a token after the first."
        )
        self._request = self._histogram("request_seconds", "From the request to its end.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were finished.")
        self._output_tokens = self._counter("generation_tokens", "Tokens generated for them.")
        self._requests = self._counter("requests", "Prompts that were finished.", "reason")
        self._responses = self._counter("http_responses", "Answers by route and status.", "route", "status")
        self._errors = self._counter("errors", "Answers with a status of 400 or more.", "status")

    def watch(self, state: Callable[[], EngineState]) -> None:
        """Also report the engine's state."""
        self.registry.register(_EngineCollector(state))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def answered(self, route: str, status: int) -> None:
        """An answer was sent."""
        self._responses.labels(route, str(status)).inc()
        if status >= 400:
            self._errors.labels(str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """See `Observer`."""
        self._first_token.observe(seconds)

    def finished(self, output: RequestOutput, seconds: float, decode_seconds: float) -> None:
        """See `Observer`."""
        longest = max(len(choice.token_ids) for choice in output.outputs)
        self._request.observe(seconds)
        if longest > 1:
            self._per_token.observe(decode_seconds / (longest - 1))
        self._prompt_tokens.inc(len(output.prompt_token_ids))
        self._output_tokens.inc(sum(len(choice.token_ids) for choice in output.outputs))
        self._requests.labels(output.outputs[0].finish_reason or "abort").inc()

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"foveal_{name}", text, buckets=_SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"foveal_{name}", text, labels, registry=self.registry)


class _EngineCollector(Collector):
    """Reads the engine's state when asked, so that nothing is counted twice."""

    def __init__(self, state: Callable[[], EngineState]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        state = self._state()
        usage = state.usage
        yield _gauge("running_sequences", "Completions that hold pages.", state.running)
        yield _gauge("waiting_sequences", "Completions that wait for pages or a seat.", state.waiting)
        yield _gauge("cache_pages", "All pages of the cache.", usage.pages_total)
        yield _gauge("cache_pages_in_use", "Pages that sequences hold.", usage.pages_in_use)
        yield _gauge("cache_pages_cached", "Pages kept for prompts that begin alike.", usage.pages_cached)
        yield _gauge("cache_snapshots", "Recurrent states kept for prompts that begin alike.", usage.snapshots)
        yield _gauge("cache_usage_ratio", "Share of the pages in use.", usage.pages_in_use / max(1, usage.pages_total))
        yield _counted("prefix_query_tokens", "Tokens looked up in the prefix cache.", usage.prefix_query_tokens)
        yield _counted("prefix_hit_tokens", "Tokens found there.", usage.prefix_hit_tokens)
        yield _counted("preemptions", "How often a sequence gave up its pages.", state.preemptions)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"foveal_{name}", text, value=value)


def _counted(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"foveal_{name}", text, value=value)
