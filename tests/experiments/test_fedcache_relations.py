"""Encoders from files, and neighbours from a graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import distill, nn
from experiments.datasets import DataError
from experiments.fedcache import encoders, neighbours

MODELS = {
    "mlp": (nn.functional(lambda rngs: nn.MLP(12, (8, 6), 3, rngs=rngs)), (12,)),
    "cnn": (nn.functional(lambda rngs: nn.CNN(1, (8, 16), 3, rngs=rngs)), (16, 16, 1)),
    "cnn1d": (nn.functional(lambda rngs: nn.CNN1D(3, 5, rngs=rngs)), (100, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_embeds_like_the_model(name, tmp_path):
    model, shape = MODELS[name]
    params = model.init(jax.random.key(1))
    encoders.save_params(tmp_path / "net.msgpack", params)
    encode, dim = encoders.load_encoder(tmp_path / "net.msgpack", shape)
    x = jax.random.normal(jax.random.key(2), (4, *shape))
    want = list(model.features(params, x).values())[-1]
    assert want.shape == (4, dim)
    np.testing.assert_allclose(encode(x), want, rtol=1e-6)


def test_a_file_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.msgpack: encoder must be a file"):
        encoders.load_encoder(tmp_path / "none.msgpack", (12,))
    (tmp_path / "text").write_text("no network")
    with pytest.raises(DataError, match="text: encoder must hold parameters"):
        encoders.load_encoder(tmp_path / "text", (12,))
    model, _ = MODELS["mlp"]
    encoders.save_params(tmp_path / "net", model.init(jax.random.key(0)))
    with pytest.raises(DataError, match=r"for inputs \(5,\)"):
        encoders.load_encoder(tmp_path / "net", (5,))
    with pytest.raises(ValueError, match="params must hold block1, block2, ... and head, got body"):
        encoders.model_of({"body": 1})


def test_a_graph_finds_what_all_pairs_find():
    pytest.importorskip("hnswlib")
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(600, 16)).astype(np.float32)
    labels = rng.integers(0, 4, size=600)
    labels[0] = 9  # alone in its class
    exact = distill.build_relations(jnp.asarray(embeddings), jnp.asarray(labels), 5)
    found = neighbours.hnsw_relations(embeddings, labels, 5)
    assert float(distill.recall(exact, found)) > 0.99
    rows, places = np.nonzero(np.asarray(found.mask))
    related = np.asarray(found.index)[rows, places]
    assert (labels[rows] == labels[related]).all() and (rows != related).all() and 0 not in rows
    again = neighbours.hnsw_relations(embeddings, labels, 5)
    np.testing.assert_array_equal(found.index, again.index)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hnswlib", None)
    with pytest.raises(ValueError, match="pip install"):
        neighbours.hnsw_relations(np.zeros((2, 2), np.float32), np.zeros(2, int), 1)
