"""The page of a run: index.html in its folder, to be read in a browser without network.

    python -m scripts.lib.page runs/toy_release

Reads what the stages left: results.md and sweep.md (scripts/lib/report.py, sweep_thresholds.py),
compare.txt (scripts/compare_logs.py), pictures/, stages/*.json or seed<n>/stages/*.json, and the
manifests of the trainings. A task's run (scripts/lib/task.sh) has no results.md yet: it is written
here. Files elsewhere, as a data set's label folders, are linked from where they are.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from scripts.lib.report import cost_table, markdown_table, stage_costs
from scripts.lib.stage import seeds_in
from util.run import UserError, atomic_path, read_json, run_main

CAPTIONS = {  # of the pictures, in the order in which they are shown
    "side_by_side": "Target images on their way: starting labels, PSA, SCC, predictions",
    "miou_curve": "Target validation mIoU after each evaluated epoch",
    "compare": "This run beside the authors' log",
    "ablation": "Target validation mIoU of every row",
    "sweep": "Labels after SCC at other thresholds",
    "scc_loss_histogram": "SCC: losses of the connectivities",
    "scc_decisions": "SCC: what became of the connectivities of each class",
    "scc_panels": "SCC: labels before and after",
    "scc_thumbnails": "SCC: most and least trusted connectivities of each class",
}
PSA_PANELS = 4  # shown of each folder that PSA made
STYLE = """
body { font-family: sans-serif; line-height: 1.4; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; border: 1px solid #ddd }
figure { margin: 1.5em 0 }
pre { overflow-x: auto; background: #f5f5f5; padding: 1em; font-size: 85% }
details pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""


def html_of(markdown: str) -> str:
    """Headings, tables and paragraphs of a results.md as HTML."""
    parts = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = block.splitlines()
        if lines[0].startswith("#"):
            parts.append(f"<h2>{html.escape(lines[0].lstrip('# '))}</h2>")
            lines = lines[1:]
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        if len(rows) > 1:  # the second one is the ruler
            rows = [[html.escape(cell.strip(" |")) for cell in row] for row in rows]
            head = "".join(f"<th>{cell}</th>" for cell in rows[0])
            body = "".join(
                "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:]
            )
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        elif lines:
            parts.append(f"<p>{html.escape(' '.join(lines))}</p>")
    return "\n".join(parts)


def stage_records(run: Path) -> dict[str, dict]:
    """{"psa" or "seed0/psa": record} of the finished stages, in the order of their ends."""
    files = [path for home in (run, *seeds_in(run)) for path in home.glob("stages/*.json")]
    files.sort(key=lambda file: file.stat().st_mtime)
    records = {
        (file.parents[1].relative_to(run) / file.stem).as_posix(): read_json(file) for file in files
    }
    return {name: record for name, record in records.items() if record.get("done")}


def made_files(run: Path, record: dict) -> list[Path]:
    """The files that a stage has made; records name those in the run's folder `@/…`."""
    return [
        run / path[2:] if path.startswith("@/") else Path(path) for path in record.get("made", {})
    ]


def address(path: Path, run: Path) -> str:
    """The path as the page links it."""
    return quote(Path(os.path.relpath(path, run)).as_posix())


def figure(path: Path, run: Path, caption: str) -> str:
    link, caption = address(path, run), html.escape(caption)
    return (
        f'<figure><a href="{link}"><img src="{link}" alt="{caption}" loading="lazy"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def pictures(run: Path, records: dict[str, dict]) -> str:
    """The run's pictures, and a few of PSA's panels of the first seed."""
    found = {path.stem: path for path in sorted((run / "pictures").glob("*.png"))}
    order = [name for name in CAPTIONS if name in found]
    parts = [
        figure(found[n], run, CAPTIONS.get(n, n)) for n in [*order, *(found.keys() - CAPTIONS)]
    ]
    for name, record in records.items():
        if name in ("psa", "psa_paper", "seed0/psa", "seed0/psa_paper"):
            panels = [path for path in made_files(run, record) if "vis" in path.parts]
            for path in panels[:PSA_PANELS]:
                folder = path.parts[path.parts.index("vis") - 1]
                parts.append(figure(path, run, f"PSA: {folder}, {path.stem}"))
    return "<h2>Pictures</h2>" + "".join(parts) if parts else ""


def links(run: Path, records: dict[str, dict]) -> str:
    """SCC's own pages, and the folders of the trainings."""
    items = []
    for name, record in records.items():
        for path in made_files(run, record):
            text = {"index.html": "SCC's page", "train.log": "training log"}.get(path.name)
            if text:
                items.append(
                    f'<li><a href="{address(path, run)}">{text}: {html.escape(name)}</a></li>'
                )
    return f"<h2>More</h2><ul>{''.join(items)}</ul>" if items else ""


def details(summary: str, text: str) -> str:
    summary, text = html.escape(summary), html.escape(text)
    return f"<details><summary>{summary}</summary><pre>{text}</pre></details>"


def provenance(run: Path, records: dict[str, dict]) -> str:
    """Every stage's command, and the manifests: versions, git state, hardware, inputs' digests."""
    parts = [details(name, " ".join(record["command"])) for name, record in records.items()]
    text = "<h2>Commands</h2>" + "".join(parts)
    parts = [
        details(name, json.dumps(read_json(path), indent=1))
        for name, record in records.items()
        for path in made_files(run, record)
        if path.name == "manifest.json" and path.is_file()
    ]
    return text + ("<h2>Manifests</h2>" + "".join(parts) if parts else "")


def task_results(run: Path) -> str:
    """A task's tables: IoU of each class before and after, and the cost of each stage."""
    found = {
        name: read_json(run / f"eval_{name}" / "metrics.json")
        for name in ("before", "after")
        if (run / f"eval_{name}" / "metrics.json").is_file()
    }
    if not found:
        raise UserError(
            f"{run}: holds no results.md and no eval_after/metrics.json; finish the run"
        )

    def shown(value):
        return "–" if value is None else f"{value:.2f}"

    rows = [["mIoU", *(shown(metrics["miou"]) for metrics in found.values())]]
    for name in next(iter(found.values()))["iou"]:
        rows.append([name, *(shown(metrics["iou"][name]) for metrics in found.values())])
    return (
        "### Validation IoU (%)\n\n"
        + markdown_table(["class", *found], rows)
        + "\n### Cost of each stage\n\n"
        + cost_table(stage_costs([run]))
    )


def write_page(run: Path) -> Path:
    """Write <run>/index.html; returns its path."""
    if not (run / "results.md").is_file() or (run / "eval_after").is_dir():
        with atomic_path(run / "results.md") as temporary:
            temporary.write_text(task_results(run), encoding="utf-8")
    records = stage_records(run)
    title = f"SeCo: {html.escape(run.resolve().name)}"
    parts = [f"<h1>{title}</h1>"]
    for name in ("results.md", "sweep.md"):
        if (run / name).is_file():
            parts.append(html_of((run / name).read_text(encoding="utf-8")))
    if (run / "compare.txt").is_file():
        text = (run / "compare.txt").read_text(encoding="utf-8")
        parts.append(f"<h2>Beside the authors' log</h2><pre>{html.escape(text.strip())}</pre>")
    parts += [pictures(run, records), links(run, records), provenance(run, records)]
    page = run / "index.html"
    with atomic_path(page) as temporary:
        temporary.write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
            f"<style>{STYLE}</style><body>" + "\n".join(filter(None, parts)) + "</body></html>\n",
            encoding="utf-8",
        )
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    print(f"page: {write_page(parser.parse_args(argv).run)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
