"""What operators see: listeners of the queue's events, as log lines (logs) and counts (metrics)."""
