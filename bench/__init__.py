"""The bench: Rejoin and its peers side by side, on one machine. `make bench` runs it; docs/performance.md reads it."""
