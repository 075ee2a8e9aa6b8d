"""Measuring exported files: quality, latency, start-up, memory, size, and the machine it was done on."""
