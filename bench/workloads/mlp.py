"""FedAvg on an MLP 784-128-10."""

from bench.federated import workload

WORKLOAD = workload("fedavg", "mlp", num_clients=(10, 100, 1000))
