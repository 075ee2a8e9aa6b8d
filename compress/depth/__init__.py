"""Depth: whole residual blocks are dropped."""
