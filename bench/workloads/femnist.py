"""FedAvg on the CNN of the paper that introduced it: 1,663,370 parameters."""

from bench.federated import workload

WORKLOAD = workload("fedavg", "femnist", num_clients=(10, 100))
