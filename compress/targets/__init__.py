"""Targets in terms of the exported file: its bytes, and its time in the runtime that runs it."""
