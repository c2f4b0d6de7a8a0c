"""Federated data: partitioners and splits on the host, federations and cohorts on the device."""

from cedarjax.core.dataset import FederatedDataset as FederatedDataset
from cedarjax.core.dataset import pad_cohort as pad_cohort
from cedarjax.core.dataset import sample_cohort as sample_cohort
from cedarjax.core.dataset import take_clients as take_clients
from cedarjax.data.blocks import prefetch as prefetch
from cedarjax.data.blocks import rows_as_cohort as rows_as_cohort
from cedarjax.data.federated import federated_dataset as federated_dataset
from cedarjax.data.federated import from_partition as from_partition
from cedarjax.data.federated import select_clients as select_clients
from cedarjax.data.partition import dirichlet_by_class as dirichlet_by_class
from cedarjax.data.partition import dirichlet_by_client as dirichlet_by_client
from cedarjax.data.partition import iid as iid
from cedarjax.data.partition import natural as natural
from cedarjax.data.partition import quantity_skew as quantity_skew
from cedarjax.data.partition import shards as shards
from cedarjax.data.split import split_clients as split_clients
from cedarjax.data.split import split_ids as split_ids
from cedarjax.data.split import split_support_query as split_support_query
from cedarjax.data.tasks import class_tasks as class_tasks
from cedarjax.data.tasks import split_pools as split_pools

__all__ = [
    "FederatedDataset",
    "class_tasks",
    "dirichlet_by_class",
    "dirichlet_by_client",
    "federated_dataset",
    "from_partition",
    "iid",
    "natural",
    "pad_cohort",
    "quantity_skew",
    "prefetch",
    "rows_as_cohort",
    "sample_cohort",
    "select_clients",
    "shards",
    "split_clients",
    "split_ids",
    "split_pools",
    "split_support_query",
    "take_clients",
]
