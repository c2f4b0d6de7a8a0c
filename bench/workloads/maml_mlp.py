"""MAML on an MLP 784-128-10."""

from bench.federated import workload

WORKLOAD = workload("maml", "mlp", num_clients=(100, 1000))
