"""FedAvg on a CNN of two small convolutions."""

from bench.federated import workload

WORKLOAD = workload("fedavg", "cnn", num_clients=(10, 100, 1000))
