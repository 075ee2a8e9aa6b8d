"""Magnitude pruning: masks, schedules, the training callback one-shot pruning. Imports nothing heavy."""
