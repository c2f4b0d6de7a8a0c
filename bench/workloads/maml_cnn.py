"""MAML on a CNN of two small convolutions."""

from bench.federated import workload

WORKLOAD = workload("maml", "cnn", num_clients=(10, 100))
