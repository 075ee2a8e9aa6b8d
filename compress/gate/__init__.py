"""Budgets and the verdicts on them."""
