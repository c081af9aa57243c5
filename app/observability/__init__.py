"""Log lines, metrics and traces, for operators.

logs         configures structlog: JSON or console, one line for each event
access_log   a log line for each request
metrics      counters and histograms for Prometheus
tracing      traces with OpenTelemetry, if the OTEL_* variables ask for them
span_export  sends the spans to a collector; imported only then
paths        the path of a request without the prefix of a proxy
"""
