"""What a run of SCC keeps in its folder and goes on from.

settings.json       what the results depend on; thresholds are not among them
index.npz           the connectivities, and the digests of the files that they come from
training.pth        a training that was stopped
checkpoint.pth      the trained classifier
scores/N.npz        loss, score and prediction of the connectivities of image N of the list
connectivities.csv  everything that is known of each connectivity
"""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dataset.scc import Data, index_image
from util.labels import check_files, check_pairs, holds_pictures
from util.outputs import atomic_path, check_settings, digests
from util.run import UserError, progress

MEND = "remove the folder or rename the experiment"


def begun(out: Path) -> bool:
    """Whether the folder holds work of some settings already."""
    names = ("training.pth", "checkpoint.pth", "connectivities.csv")
    return any((out / name).is_file() for name in names) or any((out / "scores").glob("*.npz"))


def prepare_folder(
    out: Path,
    settings: dict,
    root: Path,
    rows: list[tuple[str, str]],
    labels: list[Path],
    list_path: str,
) -> None:
    """Make index.npz and settings.json, or check those of an earlier run.

    rows: (image path, label path) of the list `list_path`; labels: the files that will be written.
    UserError if an input is missing, unreadable or unfit, or if the folder's results come from
    other settings, another list, other files, or another program.
    """
    started, path = begun(out), out / "settings.json"
    unknown = not path.is_file() and (holds_pictures(out) or any(map(Path.exists, labels)))
    if started or unknown:
        check_settings(path, settings)
    index = make_index(out, root, rows, settings["class_num"], list_path, started)
    if not len(index):
        raise UserError(
            f"{list_path}: its label maps hold no label at all (only 255); check --root-path and"
            " the list"
        )
    if not (index["area"] >= settings["min_area"]).any():
        raise UserError(
            f"--min-area {settings['min_area']}: the largest connectivity has"
            f" {index['area'].max()} pixels; give fewer"
        )
    if not started:
        check_settings(path, settings, begun=False)


def make_index(
    out: Path,
    root: Path,
    rows: list[tuple[str, str]],
    class_num: int,
    list_path: str,
    started: bool,
) -> np.ndarray:
    """The INDEX rows of all connectivities, kept in out/index.npz with the digests of all files.

    It is made anew if a file has changed; with results there (`started`) that is a UserError.
    """
    names = [name for row in rows for name in row]
    check_files(root, names, list_path)
    found = digests(root / name for name in names)
    now = np.array([found[str(root / name)] for name in names])
    if (out / "index.npz").is_file():
        with np.load(out / "index.npz") as stored:
            same_list = stored["names"].tolist() == names
            if same_list and (stored["digests"] == now).all() and stored["classes"] == class_num:
                return stored["index"]
            if started and not same_list:
                raise UserError(f"{out}: was made from another list than {list_path}; {MEND}")
            if started:
                changed = names[int((stored["digests"] != now).argmax())]
                raise UserError(
                    f"{root / changed}: has changed since the results in {out} were made; {MEND}"
                )
    check_pairs(root, rows, list_path, class_num)
    with ThreadPoolExecutor() as pool:
        jobs = pool.map(lambda i: index_image(root / rows[i][1], i, class_num), range(len(rows)))
        index = np.concatenate(list(progress(jobs, "SCC index", len(rows))))
    with atomic_path(out / "index.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, index=index, names=names, digests=now, classes=class_num)
    return index


def read_index(out: Path) -> np.ndarray:
    with np.load(out / "index.npz") as stored:
        return stored["index"]


def save_state(path: Path, **content) -> None:
    """Weights and the like with torch.save, atomically."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def score_path(out: Path, image: int) -> Path:
    return out / "scores" / f"{image:06d}.npz"


def save_scores(out: Path, image: int, scores: dict[str, np.ndarray]) -> None:
    with atomic_path(score_path(out, image)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **scores)


def read_scores(out: Path, data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss float64, score float64, predicted uint8) of all connectivities, in the index's
    order.
    """
    count = len(data.index)
    loss, score, predicted = np.empty(count), np.empty(count), np.empty(count, np.uint8)
    for image in range(len(data.rows)):
        part = data.part(image)
        with np.load(score_path(out, image)) as scores:
            loss[part], score[part] = scores["loss"], scores["score"]
            predicted[part] = scores["predicted"]
    return loss, score, predicted


def remove_scores(out: Path) -> None:
    """Scores of a classifier that is no longer there."""
    for path in (out / "scores").glob("*.npz"):
        path.unlink()


def write_connectivities(path: Path, data: Data, verdicts) -> None:
    """connectivities.csv: one line each, numbers at full precision. verdicts: seco_scc's."""
    columns = ("image", "id", "class", "area", "x", "y", "width", "height", "loss", "score")
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "prediction", "eta", "decision", "final"])
        for i, row in enumerate(data.index):
            eta = float(verdicts.eta[i])
            writer.writerow(
                [
                    data.rows[row["image"]][0],
                    *(int(value) for value in list(row)[1:]),
                    repr(float(verdicts.loss[i])),
                    repr(float(verdicts.score[i])),
                    int(verdicts.predicted[i]),
                    "" if np.isnan(eta) else repr(eta),
                    verdicts.decision[i],
                    int(verdicts.final[i]),
                ]
            )
