import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.distill import distillation_loss, knowledge_loss, peaked_logits, permuted_logits, poison_logits
from tests.distill.distill_oracles import kl, softmax

LOGITS, TEACHER = (np.random.default_rng(i).normal(size=(6, 4)) * 3 for i in range(2))
LABELS, HAS = np.array([0, 1, 2, 3, 0, 1]), np.array([True, False, True, True, False, True])


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 3.0, 7.0])
def test_the_loss_of_each_sample_by_the_formula(tau, x64):
    got = knowledge_loss(*map(jnp.asarray, (LOGITS, LABELS, TEACHER, HAS)), alpha=1.5, temperature=tau)
    for i in range(6):
        want = -np.log(softmax(LOGITS[i])[LABELS[i]])
        if HAS[i]:
            want += 1.5 * tau**2 * kl(softmax(TEACHER[i] / tau), softmax(LOGITS[i] / tau))
        np.testing.assert_allclose(got[i], want, rtol=1e-10)


@pytest.mark.parametrize("tau", [0.5, 2.0, 3.0])
def test_one_temperature_divides_both_sides(tau):
    """The published code divides the teacher by 3 and the student by nothing.

    A student that agrees with its teacher would then be pulled away, and the temperature would not matter.
    """
    logits, has = jnp.asarray(LOGITS, jnp.float32), jnp.ones(6, bool)
    loss, grads = jax.value_and_grad(lambda z: distillation_loss(z, logits, has, tau).sum())(logits)
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    np.testing.assert_allclose(grads, 0, atol=1e-5)
    demo = [kl(softmax(LOGITS[i] / 3), softmax(LOGITS[i])) for i in range(6)]
    assert min(demo) > 0.1


def test_the_temperature_matters_and_may_be_traced():
    args = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TEACHER, jnp.float32), jnp.ones(6, bool)
    taus = jnp.array([1.0, 3.0])
    swept = jax.vmap(lambda tau: distillation_loss(*args, tau))(taus)
    for row, tau in zip(swept, taus.tolist(), strict=True):
        np.testing.assert_allclose(row, distillation_loss(*args, tau), rtol=1e-5)
    assert (np.abs(swept[0] - swept[1]) > 1e-3).all()


def test_the_gradient_by_hand_and_none_into_the_teacher(x64):
    tau = 2.0
    student, teacher = jax.grad(lambda z, t: distillation_loss(z, t, jnp.asarray(HAS), tau).sum(), argnums=(0, 1))(
        jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    )
    want = np.where(HAS[:, None], tau * (softmax(LOGITS / tau) - softmax(TEACHER / tau)), 0)
    np.testing.assert_allclose(student, want, atol=1e-12)
    assert not teacher.any()


def test_without_a_teacher_there_are_only_the_labels():
    """The published code would pull towards the uniform distribution; here a row may even hold NaN."""
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    teacher, has = jnp.where(jnp.asarray(HAS)[:, None], jnp.asarray(TEACHER, jnp.float32), jnp.nan), jnp.asarray(HAS)

    def total(z):
        losses = knowledge_loss(z, labels, teacher, has, alpha=1.5, temperature=3.0)
        return jnp.where(has, 0.0, losses).sum(), losses

    (_, losses), grads = jax.value_and_grad(total, has_aux=True)(logits)
    assert jnp.isfinite(losses).all()
    want = np.where(HAS[:, None], 0, softmax(LOGITS) - np.eye(4)[LABELS])
    np.testing.assert_allclose(grads, want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sums_run_in_single_precision(dtype):
    args = jnp.asarray(LOGITS, dtype), jnp.asarray(TEACHER, jnp.float32), jnp.asarray(HAS)
    assert distillation_loss(*args, 2.0).dtype == jnp.float32


def test_poison_by_hand():
    logits = jnp.array([[4.0, -1.0, 2.0], [0.0, 5.0, 3.0], [0.0, 5.0, 3.0]])
    assert permuted_logits(logits).tolist() == [[-1.0, 4.0, 2.0], [5.0, 0.0, 3.0], [5.0, 0.0, 3.0]]
    assert peaked_logits(7.0)(logits).tolist() == [[0.0, 0.0, 7.0]] * 3
    flags = jnp.array([False, True, False])
    assert poison_logits(logits, flags).tolist() == [logits[0].tolist(), [5.0, 0.0, 3.0], logits[2].tolist()]
    assert poison_logits(logits, jnp.array(True), peaked_logits(1.0)).tolist() == [[0.0, 0.0, 1.0]] * 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: distillation_loss(z, z, jnp.ones(6, bool), 0.0), ValueError, "temperature must be above 0, got 0.0"),
        (
            lambda z: distillation_loss(z, z[:2], jnp.ones(6, bool), 1.0),
            ValueError,
            r"teacher and has must be \[B, K\] and \[B\] for logits \(6, 4\), got \(2, 4\) and \(6,\)",
        ),
        (
            lambda z: knowledge_loss(z, jnp.arange(6) % 4, z, jnp.ones(6, bool), alpha=-1.0, temperature=1.0),
            ValueError,
            "alpha must be at least 0, got -1.0",
        ),
        (
            lambda z: knowledge_loss(z, z[:, 0], z, jnp.ones(6, bool), alpha=1.0, temperature=1.0),
            TypeError,
            "labels must be integers, got float32",
        ),
        (
            lambda z: knowledge_loss(z, jnp.arange(3), z, jnp.ones(6, bool), alpha=1.0, temperature=1.0),
            ValueError,
            r"logits must be \[B, K\] for labels \[B\], got \(6, 4\) and \(3,\)",
        ),
        (lambda z: peaked_logits(0.0), ValueError, "height must be above 0, got 0.0"),
        (lambda z: peaked_logits()(z[:, :1]), ValueError, "logits must have at least 2 classes, got 1"),
        (lambda z: poison_logits(z, jnp.ones(5, bool)), ValueError, r"byzantine must have leading axes .* \(5,\)"),
    ],
)
def test_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.asarray(LOGITS, jnp.float32))
