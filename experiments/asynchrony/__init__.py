"""Servers that wait beside servers that do not, on one clock: simulated time to a target, with stragglers."""
