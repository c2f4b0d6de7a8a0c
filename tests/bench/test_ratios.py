"""What is told against a baseline."""

import io
import json

import jax.numpy as jnp
import pytest
from rich.console import Console

from bench import report
from bench.measure import Case, Measurement, Workload


def measured(part, layout, seconds):
    return Measurement(layout, part, 2, 1, seconds, seconds, 0.1, None, None)


def test_ratios_are_medians_over_turns_in_the_same_layout():
    layouts = [
        measured("plain", "loop", [1.0, 2.0, 4.0]),
        measured("sign", "loop", [1.5, 2.2, 8.0]),
        measured("plain", "vmap", [1.0, 1.0, 1.0]),
        measured("sign", "vmap", []),
        measured("sign", "elsewhere", [1.0]),
    ]
    result = report.Result("compression", 2, layouts, [], baseline="plain")
    (ratio,) = result.ratios
    assert ratio[:2] == ("sign", "loop") and ratio.ratio == pytest.approx(1.5) and ratio.least == pytest.approx(1.5)
    assert ratio.extra_ms == pytest.approx(250.0)
    assert json.loads(json.dumps(result.record()))["ratios"] == [ratio._asdict()]
    assert report.Result("mlp", 2, layouts, []).ratios == []
    console = Console(file=io.StringIO(), width=100)
    case = Case("loop", "plain", lambda x: x, (jnp.zeros(1),), 2)
    report.print_result(console, Workload("t", "client", (2,), lambda n, d: [case], baseline="plain"), result)
    printed = " ".join(console.file.getvalue().split())  # titles break where tables are narrow
    assert "2 clients, times 'plain'" in printed and "1.50" in printed
