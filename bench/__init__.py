"""Speed and memory of the kernels: `python -m bench [WORKLOAD]`."""
