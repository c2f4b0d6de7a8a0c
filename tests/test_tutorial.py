"""The tutorial runs from its first cell to its last, and its figure says what the text says."""

import json
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs/tutorial.ipynb"


@pytest.mark.standard_promotion
def test_cells_run_in_order():
    pytest.importorskip("sklearn")
    notebook = json.loads(NOTEBOOK.read_text())
    names: dict = {"__name__": "tutorial"}
    with jax.numpy_rank_promotion("allow"):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"], "outputs are not committed"
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)  # noqa: S102
    lines = {line.get_label(): line.get_ydata() for line in names["ax"].get_lines()}
    plt.close(names["figure"])
    assert sorted(lines) == ["FedAvg", "FedPer", "MAML"]
    for name, accuracy in lines.items():
        assert len(accuracy) == 11 and np.all((accuracy >= 0) & (accuracy <= 1)), name
        assert accuracy[-1] > accuracy[0] and accuracy[-1] > 0.6, name
