"""Federated meta-learning with differential privacy of whole clients: what epsilon costs in accuracy."""
