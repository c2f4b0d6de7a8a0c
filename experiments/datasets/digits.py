"""`digits`: the handwritten digits that scikit-learn brings along, as tasks; the embedded default.

Every client names some of the ten digits in a private order, so no model without adaptation can be right for two of
them. A new client has one labelled image per class. The images of training, validation and new clients come from
disjoint pools.
"""

import numpy as np
from sklearn.datasets import load_digits

from cedarjax.data import class_tasks, split_pools
from experiments.datasets.federation import NEW, TRAIN, VALIDATION, Federation, from_tasks

NUM_CLIENTS = {TRAIN: 70, VALIDATION: 10, NEW: 20}
POOLS = (0.6, 0.15, 0.25)
TRAIN_SHOTS, NUM_QUERY = 10, 10


def digits(*, seed: int = 0, num_ways: int = 5, num_shots: int = 1, num_stimuli: int = 20) -> Federation:
    """Builds 70 training, 10 validation and 20 new clients.

    Args:
      seed: draws the pools, the tasks, the images and the stimuli.
      num_ways: digits that a client names.
      num_shots: support images per class of validation and new clients; training clients have 10. All have 10 query
        images per class.
      num_stimuli: images of the validation pool, without labels, that the server uses as stimuli.
    """
    data, labels = load_digits(return_X_y=True)
    x = (data / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    pools = dict(zip((TRAIN, VALIDATION, NEW), split_pools(labels, POOLS, seed=rng), strict=True))
    tasks = {
        code: class_tasks(
            x,
            labels,
            num_clients=num_clients,
            num_classes=num_ways,
            num_support=TRAIN_SHOTS if code == TRAIN else num_shots,
            num_query=NUM_QUERY,
            pool=pools[code],
            seed=rng,
        )
        for code, num_clients in NUM_CLIENTS.items()
    }
    sizes = ", ".join(str(len(pool)) for pool in pools.values())
    return from_tasks(
        "digits",
        tasks,
        num_outputs=num_ways,
        stimuli=x[rng.choice(pools[VALIDATION], num_stimuli, replace=False)],
        notes=(
            f"Every client names {num_ways} of the 10 digits in a private order; class k means another digit to each.",
            f"Images of training, validation and new clients are disjoint ({sizes} images).",
            f"Labelled images per class of a new client: {num_shots}; it is tested on {NUM_QUERY} others per class.",
            "Stimuli: images of the validation pool, without labels.",
        ),
    )
