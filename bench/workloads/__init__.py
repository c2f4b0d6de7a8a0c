"""What is measured: one file a workload, each with a `WORKLOAD`."""
