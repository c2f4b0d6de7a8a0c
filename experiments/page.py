"""The results of a run as one HTML page that needs no other file: `report.html`."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.files import write_text
from experiments.report import Results, caption_of, detail_cells, exact_cells, findings, flat, markdown

_CSS = """
body { margin: 0; background: #f6f7f7; color: #22262b; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 2rem auto; padding: 2rem 2.5rem; background: #fff; border-radius: 12px; }
h1 { margin: .2em 0 .8em; font-size: 1.6rem; }
h2 { margin-top: 1.8em; font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .4em .8em; border-bottom: 1px solid #e8ebee; text-align: left; vertical-align: top; }
th, .facts td:first-child, .small, figcaption { color: #5f6772; }
.numbers { width: 100%; }
.numbers td + td, .numbers th + th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.best { font-weight: 700; color: #0b7a5a; }
.small, figcaption { font-size: .85rem; }
figure { margin: 2rem 0; }
img { max-width: 100%; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def html_page(results: Results, root: str | os.PathLike[str]) -> str:
    """The report as one HTML page with the plots inlined; a plot that is absent is named instead.

    Args:
      results: see `experiments.report`.
      root: folder to which the paths of the plots are relative.
    """
    header, rows, best = exact_cells(results)
    title = html.escape(results.get("title") or "Results")
    parts = [
        f"<h1>{title}</h1>",
        _html_table(header, rows, best),
        f"<p class=small>{html.escape(caption_of(results))}</p>",
    ]
    details, detail_rows = detail_cells(results)
    if len(details) > 1:
        parts.append(f"<h2>After {results['steps'][-1]} steps</h2>{_html_table(details, detail_rows, set())}")
    if sentences := [*findings(results), *results.get("notes", ())]:
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        parts.append(f"<h2>What came out</h2><ul>{items}</ul>")
    for caption, path in results.get("plots", {}).items():
        parts.append(_html_plot(caption, Path(root) / path))
    for heading, key in (("Data", "dataset"), ("Configuration", "config")):
        if results.get(key):
            table = _html_table([], [[k, v] for k, v in flat(results[key])], set())
            parts.append(f"<details{' open' if key == 'dataset' else ''}><summary>{heading}</summary>{table}</details>")
    body = "\n".join(parts)
    head = f"<meta charset=utf-8><title>{title}</title>\n<style>{_CSS}</style>"
    return f"<!doctype html>\n<html lang=en>{head}\n<main>\n{body}\n</main></html>\n"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], best: set[tuple[int, int]]) -> str:
    head = "<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in header) + "</tr>" if header else ""
    body = ""
    for i, row in enumerate(rows):
        cells = (
            f"<td{' class=best' if (i, k) in best else ''}>{html.escape(text).replace(chr(10), '<br>')}</td>"
            for k, text in enumerate(row)
        )
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<div class=wide><table class={'numbers' if header else 'facts'}>{head}{body}</table></div>"


def _html_plot(caption: str, path: Path) -> str:
    caption = html.escape(caption)
    if not path.is_file():
        return f"<p class=small>{caption}: {html.escape(path.name)} is absent.</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def write_reports(results: Results, root: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes `report.md` and `report.html` into `root`, atomically, and returns their paths."""
    paths = Path(root) / "report.md", Path(root) / "report.html"
    write_text(paths[0], markdown(results))
    write_text(paths[1], html_page(results, root))
    return paths
