import functools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments import datasets
from experiments.datasets import NEW, TRAIN, VALIDATION, DataError, DatasetNotFoundError, sources
from experiments.datasets.sensors import _window_ends, random_rotation

ROLES = (TRAIN, VALIDATION, NEW)


@functools.cache
def load(name, data_dir=None, **options):
    """A federation, loaded once; where the folder of real data lacks this set, the test is skipped."""
    try:
        return datasets.load(name, data_dir=data_dir, **options)
    except DatasetNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])


def rows_of(federation, role):
    return federation.role[federation.client_id] == role


def keys(array):
    """A set that tells the rows of an array apart by their bytes."""
    return {row.tobytes() for row in array.reshape(len(array), -1)}


def rows_with_labels(federation, mask):
    return keys(np.concatenate([federation.x[mask].reshape(mask.sum(), -1), federation.y[mask, None]], axis=1))


def check(federation):
    """What holds for every federation."""
    num_rows, num_clients = len(federation.y), federation.num_clients
    assert federation.x.dtype == np.float32 and len(federation.x) == num_rows
    assert federation.y.shape == (num_rows,)
    assert np.isfinite(federation.x).all() and np.isfinite(federation.stimuli).all()
    assert federation.client_id.dtype == np.int32
    np.testing.assert_array_equal(np.unique(federation.client_id), np.arange(num_clients))
    assert (np.diff(federation.client_id) >= 0).all()
    sizes = np.diff(federation.offsets)
    np.testing.assert_array_equal(sizes, np.bincount(federation.client_id))
    assert (federation.num_support >= 1).all() and (federation.num_support < sizes).all()
    first = federation.offsets[:-1]
    for client in range(num_clients):
        inside = federation.is_support[first[client] : first[client] + sizes[client]]
        np.testing.assert_array_equal(inside, np.arange(sizes[client]) < federation.num_support[client])
    assert all((federation.role == role).any() for role in ROLES)
    parts = [federation.train_clients, federation.validation_clients, federation.new_clients]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_clients))
    np.testing.assert_array_equal(np.flatnonzero(federation.held_out), federation.new_clients)
    assert federation.stimuli.shape[1:] == federation.x.shape[1:] and federation.stimuli.dtype == np.float32
    if federation.task == "classification":
        assert federation.y.dtype == np.int32
        np.testing.assert_array_equal(np.unique(federation.y), np.arange(federation.num_outputs))
    else:
        assert federation.y.dtype == np.float32 and federation.num_outputs == 1
        seen = federation.y[rows_of(federation, TRAIN)].astype(np.float64)
        np.testing.assert_allclose([seen.mean(), seen.std()], [0, 1], atol=1e-4)
        assert federation.target_std > 0
    for names, count in ((federation.class_names, federation.num_outputs), (federation.client_names, num_clients)):
        assert names is None or len(names) == count
    assert federation.notes
    assert datasets.summary(federation)["clients"] == dict(
        zip(("train", "validation", "new"), map(len, parts), strict=True)
    )
    stimuli = keys(federation.stimuli)
    assert not stimuli & keys(federation.x[rows_of(federation, NEW)])
    assert not stimuli & keys(federation.x[rows_of(federation, TRAIN)])


def check_standardised(federation):
    seen = federation.x[rows_of(federation, TRAIN)].astype(np.float64)
    seen = seen.reshape(-1, seen.shape[-1])
    whole = (np.abs(seen) < 10).all(axis=0)  # a feature with outliers has lost some deviation to the cut-off
    assert whole.any()
    np.testing.assert_allclose(seen.mean(axis=0)[whole], 0, atol=1e-4)
    np.testing.assert_allclose(seen.std(axis=0)[whole], 1, atol=1e-4)


def assert_same(a, b):
    for field, left, right in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=field)


def test_digits_are_tasks_with_disjoint_pools():
    federation = load("digits")
    check(federation)
    assert [len(federation.train_clients), len(federation.validation_clients), len(federation.new_clients)] == [
        70,
        10,
        20,
    ]
    assert federation.x.shape == (70 * 100 + 30 * 55, 64) and federation.x.min() == 0 and federation.x.max() == 1
    for client in range(federation.num_clients):
        rows = slice(*federation.offsets[client : client + 2])
        support = federation.is_support[rows]
        shots = 10 if federation.role[client] == TRAIN else 1
        np.testing.assert_array_equal(np.bincount(federation.y[rows][support]), [shots] * 5)
        np.testing.assert_array_equal(np.bincount(federation.y[rows][~support]), [10] * 5)
    pools = [keys(federation.x[rows_of(federation, role)]) for role in ROLES]
    assert not pools[0] & pools[1] and not pools[0] & pools[2] and not pools[1] & pools[2]
    for role in ROLES:
        inside = [
            keys(federation.x[federation.client_id == client]) for client in np.flatnonzero(federation.role == role)
        ]
        assert [len(images) for images in inside] == [100 if role == TRAIN else 55] * len(inside)


def test_digits_are_named_in_a_private_order():
    federation = load("digits")
    data, labels = load_digits(return_X_y=True)
    truth = {row.tobytes(): label for row, label in zip((data / 16).astype(np.float32), labels, strict=True)}
    digit = np.array([truth[row.tobytes()] for row in federation.x])
    orders = set()
    for client in range(federation.num_clients):
        mine = federation.client_id == client
        order = [np.unique(digit[mine & (federation.y == name)]) for name in range(5)]
        assert all(len(found) == 1 for found in order) and len({found[0] for found in order}) == 5
        orders.add(tuple(found[0] for found in order))
    assert len(orders) > 90
    for name in range(5):
        assert len(np.unique(digit[federation.y == name])) == 10


def test_digits_options():
    federation = load("digits", num_ways=3, num_shots=2, num_stimuli=7)
    check(federation)
    assert federation.num_outputs == 3 and len(federation.stimuli) == 7
    np.testing.assert_array_equal(federation.num_support[federation.held_out], 6)


def test_digits_under_label_skew():
    federation = load("digits", alpha=0.1)
    check(federation)
    data, labels = load_digits(return_X_y=True)
    truth = {row.tobytes(): label for row, label in zip((data / 16).astype(np.float32), labels, strict=True)}
    assert len(federation.y) == len(labels)
    np.testing.assert_array_equal(federation.y, [truth[row.tobytes()] for row in federation.x])
    counts = np.array([np.bincount(federation.y[federation.client_id == c], minlength=10) for c in range(60)])
    assert counts.sum(axis=1).min() >= 10
    even = load("digits", alpha=1e3)
    most = counts.max(axis=1) / counts.sum(axis=1)
    even_counts = np.array([np.bincount(even.y[even.client_id == c], minlength=10) for c in range(60)])
    assert np.median(most) > 0.5 > 0.3 > np.median(even_counts.max(axis=1) / even_counts.sum(axis=1))


@pytest.mark.parametrize("option", ["num_ways", "num_shots"])
def test_digits_are_tasks_or_a_split(option):
    with pytest.raises(ValueError, match=rf"{option} must be None with alpha, .* got 3\."):
        load("digits", alpha=0.1, **{option: 3})


@pytest.mark.parametrize("name", datasets.EMBEDDED)
def test_equal_seeds_give_equal_federations(name):
    a, b, c = datasets.load(name, seed=3), datasets.load(name, seed=3), datasets.load(name, seed=4)
    assert_same(a, b)
    assert not np.array_equal(a.x, c.x)


@pytest.mark.parametrize(
    "size, counts", [("small", (24, 6, 10)), ("medium", (100, 10, 20)), ("large", (1000, 50, 100))]
)
def test_synthetic_sizes(size, counts):
    federation = load("synthetic-iot", size=size)
    check(federation)
    assert tuple(np.sum(federation.role == role) for role in ROLES) == counts


def test_synthetic_devices_follow_the_formula():
    federation = load("synthetic-iot")
    mine, offsets = [], federation.offsets
    for client in range(federation.num_clients):
        rows = slice(offsets[client], offsets[client + 1])
        time, reading = federation.x[rows].astype(np.float64).T
        y = federation.y[rows] * federation.target_std + federation.target_mean
        terms = np.stack([np.sin(np.pi * time), np.cos(np.pi * time), reading, np.ones_like(time)], axis=1)
        weights, *_ = np.linalg.lstsq(terms, y, rcond=None)
        mine.append((y - terms @ weights).std())
        assert 0.35 < np.hypot(*weights[:2]) < 2.25 and abs(weights[2]) < 1.2
    assert 0.04 < np.mean(mine) < 0.06  # the noise
    pooled = np.concatenate([federation.x, np.sin(np.pi * federation.x), np.cos(np.pi * federation.x)], axis=1)
    weights, *_ = np.linalg.lstsq(pooled, federation.y, rcond=None)
    assert 1 - (federation.y - pooled @ weights).var() / federation.y.var() < 0.15  # no device is like the others


def test_to_dataset_keeps_clients_and_support_sets():
    federation = load("digits")
    dataset = datasets.to_dataset(federation, NEW)
    assert dataset.num_clients == 20
    np.testing.assert_array_equal(dataset.examples["x"], federation.x[rows_of(federation, NEW)])
    np.testing.assert_array_equal(dataset.examples["y"], federation.y[rows_of(federation, NEW)])
    np.testing.assert_array_equal(dataset.num_support, 5)
    np.testing.assert_array_equal(dataset.counts, 55)


def test_wisdm_wearers(shared_data_dir):
    federation = load("wisdm", data_dir=shared_data_dir, seed=1)
    check(federation)
    check_standardised(federation)
    assert federation.x.shape == (7440, 100, 3)
    assert [np.sum(federation.role == role) for role in ROLES] == [34, 6, 11]
    assert federation.class_names == ("walking", "jogging", "stairs", "sitting", "standing", "kicking")
    with np.load(shared_data_dir / "wisdm/watch_accel_w100.npz") as file:
        source = dict(file)
    assert federation.client_names == tuple(map(str, source["user"]))
    seen = source["x"][federation.role[source["client_id"]] == TRAIN].astype(np.float64)
    mean, std = seen.mean(axis=(0, 1)), seen.std(axis=(0, 1))
    for client in range(51):
        rows = slice(*federation.offsets[client : client + 2])
        raw = source["x"][source["client_id"] == client]
        y = source["y"][source["client_id"] == client]
        standard = np.clip((raw - mean) / std, -10, 10)
        support = federation.is_support[rows]
        if federation.role[client] == TRAIN:
            assert np.sum(support) == len(y) // 2
            order = np.lexsort(standard.reshape(len(y), -1)[:, :4].T)
            mine = np.lexsort(federation.x[rows].reshape(len(y), -1)[:, :4].T)
            np.testing.assert_allclose(federation.x[rows][mine], standard[order], atol=1e-4)
            np.testing.assert_array_equal(np.bincount(federation.y[rows]), np.bincount(y))
            assert len(np.unique(federation.y[rows][support])) > 3  # shuffled, not sorted by class
        else:
            first = np.concatenate([np.flatnonzero(y == label)[:5] for label in np.unique(y)])
            later = np.setdiff1d(np.arange(len(y)), first)
            np.testing.assert_allclose(federation.x[rows][support], standard[np.sort(first)], atol=1e-4)
            np.testing.assert_array_equal(federation.y[rows][~support], y[later])
            np.testing.assert_allclose(federation.x[rows][~support], standard[later], atol=1e-4)
    pool = keys(federation.x[rows_of(federation, VALIDATION)])
    assert keys(federation.stimuli) <= pool


def test_wisdm_private_labels(shared_data_dir):
    plain = load("wisdm", data_dir=shared_data_dir, seed=1)
    private = load("wisdm", data_dir=shared_data_dir, seed=1, heterogeneity="labels")
    check(private)
    np.testing.assert_array_equal(private.role, plain.role)
    assert private.class_names is None
    orders = set()
    for client in np.flatnonzero(plain.role != TRAIN):
        rows = slice(*plain.offsets[client : client + 2])
        pairs = set(zip(plain.y[rows].tolist(), private.y[rows].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        orders.add(tuple(sorted(pairs)))
    assert len(orders) > 10


def test_wisdm_private_rotation_keeps_norms(shared_data_dir):
    plain = load("wisdm", data_dir=shared_data_dir, seed=1)
    turned = load("wisdm", data_dir=shared_data_dir, seed=1, heterogeneity="rotation")
    check(turned)
    check_standardised(turned)
    with np.load(shared_data_dir / "wisdm/watch_accel_w100.npz") as file:
        raw, owner = file["x"].astype(np.float64), file["client_id"]
    seen = raw[plain.role[owner] == TRAIN]
    mean, std = seen.mean(axis=(0, 1)), seen.std(axis=(0, 1))
    matrices = []
    for client in plain.new_clients:
        rows = slice(*plain.offsets[client : client + 2])
        before, after = plain.x[rows].reshape(-1, 3), turned.x[rows].reshape(-1, 3)
        whole = (np.abs(before) < 10).all(axis=1) & (np.abs(after) < 10).all(axis=1)
        metres = before[whole].astype(np.float64) * std + mean
        terms = np.concatenate([metres, np.ones((len(metres), 1))], axis=1)
        affine, *_ = np.linalg.lstsq(terms, after[whole].astype(np.float64), rcond=None)
        np.testing.assert_allclose(terms @ affine, after[whole], atol=1e-4)
        matrices.append(affine[:3])
    # A rotation Q followed by the common scaling D of the axes: (QD)'(QD) = D^2, the same for all, and diagonal.
    for matrix in matrices:
        squared = matrix.T @ matrix
        np.testing.assert_allclose(squared, np.diag(np.diag(squared)), atol=1e-7)
        np.testing.assert_allclose(squared, matrices[0].T @ matrices[0], atol=1e-7)
    assert all(not np.allclose(matrix, matrices[0], atol=0.01) for matrix in matrices[1:])


def test_rotations_are_rotations():
    for seed in range(20):
        q = random_rotation(np.random.default_rng(seed))
        np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(q) == pytest.approx(1)


def test_beijing_stations(shared_data_dir):
    federation = load("beijing-air", data_dir=shared_data_dir, max_per_client=300)
    check(federation)
    check_standardised(federation)
    assert federation.x.shape == (12 * 300, 16)
    assert [np.sum(federation.role == role) for role in ROLES] == [7, 2, 3]
    np.testing.assert_array_equal(federation.num_support, np.where(federation.role == TRAIN, 150, 50))
    target = federation.y * federation.target_std + federation.target_mean
    assert 1 < target.min() < 10 and 40 < target.mean() < 120 and target.max() < 1000
    assert keys(federation.stimuli) <= keys(federation.x[rows_of(federation, VALIDATION)])
    # PM10, the first of the other sensors, tells most about PM2.5: inputs and targets belong together.
    assert np.corrcoef(federation.x[:, 0], federation.y)[0, 1] > 0.75


def test_beijing_windows_end_with_the_hour_of_the_target(shared_data_dir):
    federation = load("beijing-air", data_dir=shared_data_dir, max_per_client=200, window=6)
    check(federation)
    assert federation.x.shape == (2400, 6, 16)
    told = [np.corrcoef(federation.x[:, hour, 0], federation.y)[0, 1] for hour in range(6)]
    assert np.argmax(told) == 5 and told[5] > 0.75


def test_windows_hold_no_missing_hour():
    is_complete = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1], bool)
    rows = np.arange(9)
    np.testing.assert_array_equal(_window_ends(rows, is_complete, 1), np.flatnonzero(is_complete))
    np.testing.assert_array_equal(_window_ends(rows, is_complete, 2), [1, 4, 5, 6])
    np.testing.assert_array_equal(_window_ends(rows, is_complete, 3), [5, 6])
    np.testing.assert_array_equal(_window_ends(rows[3:], is_complete, 3), [5, 6])
    assert _window_ends(rows[:3], is_complete, 5).size == 0


def test_omniglot_tasks(shared_data_dir):
    federation = load("omniglot", data_dir=shared_data_dir)
    check(federation)
    assert federation.x.shape[1:] == (28, 28, 1) and federation.x.min() == 0 and federation.x.max() == 1
    assert [np.sum(federation.role == role) for role in ROLES] == [100, 20, 40]
    np.testing.assert_array_equal(federation.num_support, np.where(federation.role == TRAIN, 50, 5))
    with np.load(shared_data_dir / "omniglot/background_small.npz") as file:
        images, character = file["x28"], file["char_id"]
    truth = {}
    for image, number in zip((images / np.float32(255)).reshape(len(images), -1), character, strict=True):
        truth.setdefault(image.tobytes(), set()).add(int(number))
    characters = []
    for role in ROLES:
        found = [truth[row.tobytes()] for row in federation.x[rows_of(federation, role)].reshape(-1, 784)]
        characters.append(set.union(*(numbers for numbers in found if len(numbers) == 1)))
    assert not characters[0] & characters[1] and not characters[0] & characters[2] and not characters[1] & characters[2]
    assert keys(federation.stimuli) <= keys((images / np.float32(255)).reshape(len(images), -1))


def test_mnist_published_split(shared_data_dir):
    federation = load("mnist", data_dir=shared_data_dir, max_per_client=100)
    check(federation)
    assert federation.x.shape == (2000, 28, 28, 1)
    assert [np.sum(federation.role == role) for role in ROLES] == [13, 2, 5]
    np.testing.assert_array_equal(federation.num_support, 50)
    with np.load(shared_data_dir / "mnist/full70k_pfllib_dir20.npz") as file:
        images, labels, owner = file["x"][file["client_id"] == 7], file["y"][file["client_id"] == 7], 7
    truth = {
        row.tobytes(): label for row, label in zip((images / np.float32(255)).reshape(-1, 784), labels, strict=True)
    }
    mine = federation.client_id == owner
    found = [truth[row.tobytes()] for row in federation.x[mine].reshape(-1, 784)]
    np.testing.assert_array_equal(found, federation.y[mine])


def test_mnist_dirichlet_split(shared_data_dir):
    skewed = load("mnist", data_dir=shared_data_dir, alpha=0.1, max_per_client=40)
    even = load("mnist", data_dir=shared_data_dir, alpha=100.0, max_per_client=40)
    shares = []
    for federation in (skewed, even):
        check(federation)
        assert [np.sum(federation.role == role) for role in ROLES] == [100, 10, 20]
        counts = np.stack([np.bincount(federation.y[federation.client_id == c], minlength=10) for c in range(130)])
        shares.append((counts.max(axis=1) / counts.sum(axis=1)).mean())
    assert shares[0] > 0.5 and shares[1] < 0.25
    with np.load(shared_data_dir / "mnist/full70k_pfllib_dir20.npz") as file:
        test_images = keys(file["x"][file["from_t10k"]] / np.float32(255))
    assert keys(skewed.x[rows_of(skewed, NEW)]) <= test_images
    assert not keys(skewed.x[~rows_of(skewed, NEW)]) & test_images


@pytest.mark.parametrize("name", ["redwine", "california", "bike", "olscancer"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 10.0])
def test_tables(shared_data_dir, name, alpha):
    federation = load(name, data_dir=shared_data_dir, alpha=alpha)
    check(federation)
    check_standardised(federation)
    assert federation.num_clients == 60
    np.testing.assert_array_equal(federation.new_clients, np.arange(50, 60))
    assert len(federation.validation_clients) == 8
    new = rows_of(federation, NEW)
    assert not rows_with_labels(federation, new) & rows_with_labels(federation, ~new)
    np.testing.assert_array_equal(federation.num_support, np.diff(federation.offsets) // 2)
    folder = sources.SOURCES[name].file.split("/")[0]
    with np.load(shared_data_dir / folder / f"alpha{alpha}.npz") as file:
        source = dict(file)
    full = datasets.table(name, data_dir=shared_data_dir, alpha=alpha, drop_shared_rows=False)
    seen = full.role[source["client_id"]] == TRAIN
    mean, std = source["x"][seen].mean(axis=0, dtype=np.float64), source["x"][seen].std(axis=0, dtype=np.float64)
    for client in (0, 30, 55):
        expected = np.clip((source["x"][source["client_id"] == client] - mean) / std, -10, 10)
        found = full.x[full.client_id == client]
        np.testing.assert_allclose(np.sort(found, axis=0), np.sort(expected, axis=0), atol=1e-4)


def test_redwine_labels_and_constant_baseline(shared_data_dir):
    federation = load("redwine", data_dir=shared_data_dir)
    assert federation.num_outputs == 5 and federation.class_names[0] == "quality 3"
    new = rows_of(federation, NEW)
    assert np.bincount(federation.y[new]).max() / new.sum() == pytest.approx(0.39, abs=0.05)
    kept = datasets.table("redwine", data_dir=shared_data_dir, drop_shared_rows=False)
    assert len(kept.y) - len(federation.y) == 84 and any("kept on both sides" in note for note in kept.notes)
    # Rows are shuffled: support and query of a client hold much the same labels, which the sorted files' halves do not.
    distances = []
    for client in range(60):
        rows = slice(*federation.offsets[client : client + 2])
        halves = [
            np.bincount(federation.y[rows][federation.is_support[rows] == side], minlength=5) for side in (True, False)
        ]
        distances.append(0.5 * np.abs(halves[0] / halves[0].sum() - halves[1] / halves[1].sum()).sum())
    assert np.mean(distances) < 0.3


def test_regression_targets_can_be_told_in_their_own_unit(shared_data_dir):
    federation = load("olscancer", data_dir=shared_data_dir)
    target = federation.y * federation.target_std + federation.target_mean
    assert 55 < target.min() < 80 and 250 < target.max() < 300


def test_unknown_names_and_options_are_told():
    with pytest.raises(
        ValueError, match=r"name must be one of digits, synthetic-iot, .*, got 'digit'\. Did you mean 'digits'\?"
    ):
        datasets.load("digit")
    with pytest.raises(ValueError, match=r"got 'imagenet'\.$"):
        datasets.load("imagenet")
    with pytest.raises(
        ValueError, match=r"window is not an option of data set 'digits' \(got 5\); its options are alpha, num_ways"
    ):
        datasets.load("digits", window=5)
    with pytest.raises(ValueError, match="size must be one of small, medium, large, got 'huge'"):
        datasets.load("synthetic-iot", size="huge")
    with pytest.raises(ValueError, match=r"alpha must be one of 0\.1, 0\.5, 1\.0, 5\.0, 10\.0 for bike, got 0\.3"):
        datasets.load("bike", alpha=0.3)
    with pytest.raises(ValueError, match="heterogeneity must be one of plain, rotation, labels, got 'colour'"):
        datasets.load("wisdm", heterogeneity="colour")
    with pytest.raises(ValueError, match="num_stimuli must be at least 2, got 1"):
        datasets.load("digits", num_stimuli=1)


@pytest.mark.parametrize("name", [name for name in datasets.LOADERS if name not in datasets.EMBEDDED])
def test_absent_set_says_where_and_how(tmp_path, monkeypatch, name):
    with pytest.raises(DatasetNotFoundError) as caught:
        datasets.load(name, data_dir=tmp_path / "nowhere")
    assert isinstance(caught.value, FileNotFoundError)
    for part in (str(tmp_path / "nowhere"), "Source:", "Licence:", "CEDARJAX_DATA", "--data-dir", ".npz"):
        assert part in str(caught.value)
    assert sources.SOURCES[name].origin in str(caught.value)
    monkeypatch.setenv("CEDARJAX_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DatasetNotFoundError, match="elsewhere"):
        datasets.load(name)


def test_argument_wins_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CEDARJAX_DATA", str(tmp_path / "environment"))
    assert sources.data_directory(tmp_path / "argument")[0] == tmp_path / "argument"
    assert sources.data_directory()[0] == tmp_path / "environment"


def fake_wisdm(folder, **changes):
    rng = np.random.default_rng(0)
    owner, label = np.repeat(np.arange(51), 24), np.tile(np.repeat(np.arange(6), 4), 51)
    arrays = {
        "x": rng.normal(size=(51 * 24, 100, 3)).astype(np.float32),
        "y": label.astype(np.int8),
        "client_id": owner.astype(np.int16),
        "user": np.arange(1600, 1651),
        "classes": np.array(["a", "b", "c", "d", "e", "f"]),
    } | changes
    path = folder / "wisdm" / "watch_accel_w100.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_odd_files_are_told_by_file_and_key(tmp_path):
    path = fake_wisdm(tmp_path)
    check(datasets.load("wisdm", data_dir=tmp_path, num_shots=2))
    nan = np.zeros((51 * 24, 100, 3), np.float32)
    nan[7, 3, 1] = np.nan
    for changes, message in (
        ({"y": None}, r"watch_accel_w100.npz must hold the arrays x, y, .*; y is absent, it holds x, client_id"),
        ({"x": nan}, r"x must be finite, got 1 rows with NaN or infinity, the first is row 7"),
        ({"x": np.zeros((51 * 24, 50, 3))}, r"x must have shape \[n, 100, 3\], got \[1224, 50, 3\]"),
        (
            {"y": np.zeros(5, np.int8)},
            r"x, y, client_id must have one row for each example, got shapes x \[1224, 100, 3\]",
        ),
        ({"y": np.full(51 * 24, 6)}, r"y must hold integers 0..5, got 6..6"),
        ({"client_id": np.repeat(np.arange(51), 24) + 1}, r"client_id must hold integers 0..50, got 1..51"),
        ({"user": np.arange(40)}, r"user must name 51 wearers, got 40"),
        ({"y": np.array([None] * (51 * 24))}, r"array y cannot be read: .*allow_pickle=False"),
    ):
        fake_wisdm(tmp_path, **changes)
        with pytest.raises(DataError, match=message) as caught:
            datasets.load("wisdm", data_dir=tmp_path)
        assert str(path) in str(caught.value)
    whole = fake_wisdm(tmp_path).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"hello", b"PK\x03\x04" + b"0" * 50):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"watch_accel_w100\.npz must be an \.npz file"):
            datasets.load("wisdm", data_dir=tmp_path)
    damaged = bytearray(whole)
    damaged[1000:1100] = bytes(100)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"watch_accel_w100\.npz: array x cannot be read"):
        datasets.load("wisdm", data_dir=tmp_path)


def own(folder, **changes):
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(10), 8)
    arrays = {"x": rng.normal(3, 2, size=(80, 4)), "y": np.tile([3, 7], 40), "client_id": owner * 5 - 7} | changes
    path = folder / "mine.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_own_classification(tmp_path):
    federation = datasets.load_npz(own(tmp_path))
    check(federation)
    check_standardised(federation)
    assert federation.name == "mine" and federation.class_names == ("3", "7") and federation.num_outputs == 2
    assert federation.client_names == tuple(str(5 * client - 7) for client in range(10))
    assert [np.sum(federation.role == role) for role in ROLES] == [7, 1, 2]
    assert_same(federation, datasets.load_npz(tmp_path / "mine.npz"))


def test_own_regression_and_split(tmp_path):
    split = np.repeat([0, 1, 0, 0, 1, 0, 0, 0, 0, 0], 8)
    path = own(tmp_path, y=np.linspace(10, 20, 80), split=split)
    federation = datasets.load_npz(path)
    check(federation)
    assert federation.task == "regression" and federation.class_names is None
    np.testing.assert_array_equal(federation.new_clients, [1, 4])
    target = np.sort(federation.y * federation.target_std + federation.target_mean)
    np.testing.assert_allclose(target, np.linspace(10, 20, 80), rtol=1e-5)
    raw = datasets.load_npz(path, standardize=False, seed=5)
    np.testing.assert_allclose(np.sort(raw.y), np.linspace(10, 20, 80), rtol=1e-6)
    with np.load(path) as file:
        assert keys(raw.x) == keys(file["x"].astype(np.float32))


def test_own_statistics_are_those_of_training_clients(tmp_path):
    split = np.repeat([0] * 8 + [1] * 2, 8)
    x = np.random.default_rng(1).normal(size=(80, 4))
    plain = datasets.load_npz(own(tmp_path, x=x, split=split))
    moved = datasets.load_npz(own(tmp_path, x=np.where(split[:, None] == 1, x + 100, x), split=split))
    seen = ~rows_of(plain, NEW)
    np.testing.assert_array_equal(plain.x[seen], moved.x[seen])
    assert (moved.x[~seen] == 10).all()  # cut off


def test_own_task_can_be_given(tmp_path):
    path = own(tmp_path)
    assert datasets.load_npz(path, task="regression").task == "regression"
    floats = own(tmp_path, y=np.tile([0.0, 1.0], 40))
    assert datasets.load_npz(floats).task == "regression"
    assert datasets.load_npz(floats, task="classification").num_outputs == 2
    with pytest.raises(ValueError, match="task must be one of classification, regression, got 'ranking'"):
        datasets.load_npz(path, task="ranking")


def test_own_text_ids_images_and_unseen_classes(tmp_path):
    owner = np.repeat(["zoe", "adam", "eve", "bob"], 6)
    split = (owner == "eve").astype(np.uint8)
    y = np.where(owner == "eve", np.arange(24) % 3, np.arange(24) % 2)
    images = np.random.default_rng(0).integers(0, 255, size=(24, 5, 5, 3), dtype=np.uint8)
    federation = datasets.load_npz(own(tmp_path, x=images, y=y, client_id=owner, split=split), num_stimuli=100)
    check(federation)
    assert federation.client_names == ("adam", "bob", "eve", "zoe") and list(federation.new_clients) == [2]
    assert len(federation.stimuli) == 6
    assert any("Classes that no training client has: 2" in note for note in federation.notes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"y": None}, "y is absent, it holds x, client_id"),
        ({"x": np.zeros(80)}, r"x must have shape \[n, \.\.\.\] with at least one feature axis, got \[80\]"),
        ({"x": np.zeros((80, 2), complex)}, "x must hold real numbers, got dtype complex128"),
        ({"x": np.full((80, 2), np.inf)}, "x must be finite, got 80 rows"),
        ({"y": np.zeros((80, 2))}, r"y must have shape \[n\], got \[80, 2\]"),
        ({"y": np.full(80, np.nan)}, "y must be finite"),
        ({"y": np.array(["a"] * 80)}, "y must hold integers .* or floats"),
        ({"y": np.zeros(80, int)}, "y must hold at least 2 classes, got only 0"),
        ({"y": np.zeros(79, int)}, "x, y, client_id must have one row for each example"),
        ({"client_id": np.zeros(80)}, r"client_id must be \[n\] integers or text, got float64"),
        ({"client_id": np.arange(80) // 40}, "client_id must name at least 3 clients .* got 2"),
        ({"client_id": np.minimum(np.arange(80), 70)}, "at least 2 examples .* got 1 for 70 clients"),
        ({"split": np.full(80, 2)}, r"split must be \[n\] of 0 and 1"),
        ({"split": np.arange(80) % 2}, "split must be the same for all rows of a client"),
        (
            {"split": np.zeros(80, int)},
            "split must hold out at least 1 client and leave at least 2, got 0 held out of 10",
        ),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int), "client_id": np.zeros(0, int)}, "at least 1 example, got 0"),
    ],
)
def test_own_errors_name_file_key_and_what_was_expected(tmp_path, changes, message):
    path = own(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        datasets.load_npz(path)
    assert str(path) in str(caught.value)


def test_own_floats_are_no_classes(tmp_path):
    with pytest.raises(DataError, match=r"y must hold whole numbers for classification, got floats such as 0\.5"):
        datasets.load_npz(own(tmp_path, y=np.full(80, 0.5)), task="classification")


def test_own_file_that_is_absent_or_a_bare_array(tmp_path):
    with pytest.raises(
        DatasetNotFoundError, match=r"nothing\.npz must be an \.npz file with the arrays x, y, client_id"
    ):
        datasets.load_npz(tmp_path / "nothing.npz")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(DataError, match="must be an .npz file with named arrays"):
        datasets.load_npz(tmp_path / "bare.npy")
