"""What services count about themselves, and where it can be read.

    code --plain ints--> instruments --read when somebody asks--> /metrics (Prometheus), OTLP (a collector)

- `instruments`: counters, gauges and histograms that cost tens of nanoseconds to write, without a library.
- `export`: the readers of OpenTelemetry's SDK, and Prometheus's HTTP server.

Every metric is a `Spec` in its service's `metrics.py`; `scripts/metrics_reference.py` writes the table of
docs/telemetry.md from them. Objects own the instruments that they write; a service lists them once, for
`export.serving`.
"""

from milepost_common.metrics.instruments import (
    SECONDS,
    Counter,
    Gauge,
    Histogram,
    Instrument,
    Kind,
    Phases,
    Spec,
    Watched,
)

__all__ = [
    "SECONDS",
    "Counter",
    "Gauge",
    "Histogram",
    "Instrument",
    "Kind",
    "Phases",
    "Spec",
    "Watched",
]
