"""What the tests of this family share."""

from collections.abc import Iterator

import jax
import pytest

collect_ignore = ["goldens"]  # the script needs fedjax


@pytest.fixture(autouse=True)
def fast_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of the time here is XLA's.

    What is compared with no jit is compiled as it would be for a user, and so is what memory is measured of.
    """
    optimised = any(word in request.node.name for word in ("jit", "memory"))
    jax.config.update("jax_disable_most_optimizations", not optimised)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
