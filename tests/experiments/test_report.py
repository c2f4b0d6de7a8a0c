import base64
import html.parser
import io
import re

import numpy as np
import pytest
from rich.console import Console

from experiments import page, plots, report


def make_results(**changes):
    runs = [
        {
            "name": "Cedar",
            "scores": [[0.20, 0.80], [0.22, 0.84]],
            "uploaded_bytes": 3_000_001,
            "downloaded_bytes": 4_000_000,
            "saved_bytes": 1_000_000,
            "seconds": 4.25,
        },
        {"name": "MAML", "scores": [[0.21, 0.90], [0.19, 0.94]], "uploaded_bytes": 4_000_000},
        {
            "name": "Cedar, poisoned",
            "scores": [[None, 0.70], [None, 0.74]],
            "poisoned_caught": [6, 7],
            "honest_dropped": [1, 28],
        },
    ]
    return {"title": "Digits <as> tasks", "metric": "accuracy", "steps": [0, 20], "runs": runs} | changes


def printed(results, width=80, **options):
    buffer = io.StringIO()
    report.print_report(results, Console(file=buffer, width=width, color_system=None), **options)
    return buffer.getvalue()


class Reader(html.parser.HTMLParser):
    """Collects texts and images, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.images, self.best = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("td", "th", "li", "h1", "p"):
            self.cells.append(data)
            if self.open[-1][1].get("class") == "best":
                self.best.append(data)


def test_terminal_report_fits_80_columns_and_says_everything():
    text = printed(make_results(notes=["A note [with brackets]."]), report="/somewhere/report.html")
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        ".210 ±.014",
        ".820 ±.028",
        ".920 ±.028",
        "3.00 MB",
        "1.00 MB",
        "6/7",
        "1/28",
        "4.2",
        "Digits <as> tasks",
    ):
        assert part in text
    assert "A note [with brackets]." in text
    assert text.rstrip().endswith("Report and plots: /somewhere/report.html")


def test_findings_are_ranked_and_honest_about_the_spread():
    found = report.findings(make_results())
    assert found == [
        "Before adaptation all are alike within the spread (accuracy 0.200 to 0.210).",
        "After 20 steps MAML is best (accuracy 0.920); next is Cedar, 0.100 behind.",
        "Cedar uploaded 3.00 MB and saved 1.00 MB (25.0%).",
        "Cedar, poisoned caught 6 of 7 (85.7%) of the poisoned uploads.",
        "Cedar, poisoned wrongly dropped 1 of 28 (3.6%) of the honest uploads.",
    ]


def test_what_is_within_the_spread_of_the_best_shares_its_place():
    runs = [
        {"name": "A", "scores": [[0.80], [0.90]]},
        {"name": "B", "scores": [[0.86], [0.86]]},
        {"name": "C", "scores": [[0.50], [0.50]]},
    ]
    results = make_results(steps=[1], runs=runs)
    assert report.findings(results) == [
        "After 1 step B is best (accuracy 0.860), A within the spread of it; next is C, 0.360 behind."
    ]
    _, _, best = report.exact_cells(results)
    assert best == {(0, 1), (1, 1)}


def test_lower_is_better_turns_the_ranking():
    runs = [{"name": "A", "scores": [[0.5]]}, {"name": "B", "scores": [[0.9]]}]
    results = make_results(metric="MSE", steps=[5], runs=runs)
    assert report.findings(results)[0].startswith("After 5 steps B is best")
    assert report.findings(results | {"lower_is_better": True})[0].startswith("After 5 steps A is best")


def test_markdown_has_exact_bytes_and_marks_the_best():
    text = report.markdown(make_results(dataset={"clients": {"train": 70}, "notes": ["a|b", "c"]}, config={"seed": 0}))
    assert text.startswith("# Digits <as> tasks\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == (
        "|  | 0 steps | 20 steps | uploaded | saved | downloaded | poisoned caught | honest dropped | seconds |"
    )
    assert rows[2] == "| Cedar | 0.210 ±0.014 | 0.820 ±0.028 | 3,000,001 B | 1,000,000 B | 4,000,000 B | – | – | 4.2 |"
    assert rows[3].startswith("| MAML | 0.200 ±0.014 | **0.920 ±0.028** | 4,000,000 B | – |")
    assert rows[4].startswith("| Cedar, poisoned | – | 0.720 ±0.028 |")
    assert "6 of 7 (85.7%) | 1 of 28 (3.6%)" in rows[4]
    assert "| clients.train | 70 |" in rows and r"| notes | a\|b<br>c |" in rows and "| seed | 0 |" in rows
    assert "mean ± standard deviation of 2 seeds" in text


def test_one_seed_has_no_spread_and_unfilled_columns_are_left_out():
    results = {
        "metric": "R2",
        "steps": [1],
        "runs": [{"name": "A", "scores": [[-0.25]]}, {"name": "B", "scores": [[0.5]]}],
    }
    text = report.markdown(results)
    assert "|  | 1 step |\n" in text and "| A | -0.250 |" in text and "| B | **0.500** |" in text
    assert "one seed" in text and "uploaded" not in text
    assert "-.250" in printed(results)


def test_reports_are_self_contained(tmp_path):
    plots.plot_spread(tmp_path / "plots" / "spread.png", {"A": ([0.1], [0.9])})
    results = make_results(
        plots={"Spread & more": "plots/spread.png", "Lost": "plots/lost.png"}, dataset={"name": "d"}, config={"seed": 0}
    )
    markdown_path, html_path = page.write_reports(results, tmp_path)
    assert "![Spread & more](plots/spread.png)" in markdown_path.read_text()
    text = html_path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert "Digits <as> tasks" in reader.cells and "3,000,001 B" in reader.cells
    assert reader.best == ["0.920 ±0.028"]
    (image,) = reader.images
    assert (
        base64.b64decode(image.removeprefix("data:image/png;base64,")) == (tmp_path / "plots/spread.png").read_bytes()
    )
    assert any("lost.png is absent" in cell for cell in reader.cells)
    assert not re.search(r"(src|href)=(?!\"data:)", text)


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="results must hold 'metric', 'steps' and 'runs', got 'title'"):
        report.findings({"title": "t"})
    runs = [{"name": "A", "scores": [[0.1, 0.2, 0.3]]}]
    with pytest.raises(ValueError, match=r"scores of 'A' must have shape \[R, 2\] with R >= 1, got \[1, 3\]"):
        report.markdown(make_results(runs=runs))


def test_numpy_values_are_taken():
    runs = [{"name": "A", "scores": np.full((2, 2), 0.5, np.float32), "uploaded_bytes": np.int64(10)}]
    assert "10 B" in report.markdown(make_results(runs=runs))


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_400, "999 kB"), (999_999, "1.00 MB"), (2.5e9, "2.50 GB")],
)
def test_human_bytes(count, text):
    assert report.human_bytes(count) == text


def test_details_stand_in_every_form_of_the_report(tmp_path):
    results = {
        "metric": "accuracy",
        "steps": [0, 20],
        "runs": [
            {"name": "A", "scores": [[0.1, 0.5]], "details": {"MCC": "0.321", "adapts by": "sgd 0.1"}},
            {"name": "B", "scores": [[0.1, 0.4]]},
        ],
    }
    console = Console(width=80, record=True, file=io.StringIO())
    report.print_report(results, console)
    for text in (console.export_text(), report.markdown(results), page.html_page(results, tmp_path)):
        assert "0.321" in text and "sgd 0.1" in text and "After 20 steps" in text
