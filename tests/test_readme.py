"""The README's examples run as they stand there."""

import pathlib
import re

import jax
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.standard_promotion
def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # noqa: S102
    before, after = names["state"].server.params, names["personal"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert any(jax.tree.leaves(moved))
    assert names["history"].client_id.shape == (50, 20)
    assert float(names["history"].info.local.loss[-1].mean()) < float(names["history"].info.local.loss[0].mean())
