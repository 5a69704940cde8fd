"""PSA: equality with the oracle, its parts, resuming, sharding, bad input."""

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import beside_a_second, killed
from scipy import ndimage
from torch.nn import functional as F

import seco_sam
from dataset.psa import doubts
from dataset.toy import draw_scene
from model import segmenter
from model.sam import build_sam
from model.sam_fast import FastSam
from model.segmenter import ProposalSettings
from tests.oracle_psa import components, oracle_psa, paper_prompt, release_prompt
from util.labels import CITYSCAPES_19, IGNORE, read_image, read_label, write_label, write_list
from util.options import help_texts
from util.run import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sam():
    return build_sam("tiny")


def speckled(label: np.ndarray, seed: int, class_num: int = 19) -> np.ndarray:
    """Pixel-level pseudo-labels as a model might give: blobs without a label, blobs of a wrong
    class.
    """
    random = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(random.standard_normal(label.shape), 5) for _ in range(2)]
    noisy = np.where(fields[0] > 0.06, random.integers(class_num), label)
    return np.where(fields[1] > 0.03, IGNORE, noisy).astype(np.uint8)


def scene(seed: int, height: int = 96, width: int = 192) -> tuple[np.ndarray, np.ndarray]:
    drawn = draw_scene(seed, "target", height, width)
    return drawn.image, speckled(drawn.label, seed)


# Few points keep the tests short; looser thresholds give proposals that overlap. The official
# settings: test_psa_conformance.py.
FEW = ProposalSettings(points_per_side=6, predicted_iou=0.6, stability=0.8)


def few(sam, **options) -> FastSam:
    return FastSam(sam, settings=FEW, **options)


def psa(image, label, segmenter, *recipe, **how) -> seco_sam.Aggregation:
    return seco_sam.aggregate(image, label, segmenter, CITYSCAPES_19, *recipe, **how)


@pytest.mark.parametrize("recipe", ["release", "paper"])
def test_equals_the_oracle(sam, recipe):
    kinds = CITYSCAPES_19.stuff, CITYSCAPES_19.things
    for seed, size in enumerate(((150, 250), (250, 150), (97, 203))):
        image, label = scene(seed, *size)
        fast = psa(image, label, few(sam, prompt_batch=7), recipe).label
        slow = oracle_psa(image, label, sam, *kinds, recipe, FEW)
        assert (fast != IGNORE).any() and (fast == slow).mean() >= 0.9999


@pytest.mark.parametrize("size", [(150, 250), (192, 384), (300, 500)])
def test_stability_and_boxes_on_a_cpu_are_the_packages(sam, size):
    """Against the GPU's path, segment_anything's score and boxes of masks enlarged by torch."""
    fast = few(sam)
    fast.set_image(scene(0, *size)[0])
    low = 4 * torch.randn(12, 24, 48, generator=torch.Generator().manual_seed(0))
    low = F.interpolate(low[:, None], (97, 193), mode="bicubic")[:, 0]  # as smooth as masks are
    low[0], low[1] = -5, 5  # nothing at all; everything
    fast.settings = replace(FEW, stability=0.5)
    stable, boxes = fast._stable(low)
    fast.device = torch.device("meta")  # whatever is no CPU
    expected, expected_boxes = fast._stable(low)
    assert torch.equal(stable, expected) and torch.equal(boxes, expected_boxes)
    assert not stable[0] and stable[1] and 2 < stable.sum() < 12


@pytest.mark.parametrize("recipe, plain", [("release", release_prompt), ("paper", paper_prompt)])
def test_prompts_equal_the_oracle(recipe, plain):
    label = speckled(draw_scene(3, "source", 96, 192).label, 3)
    prompts = iter(seco_sam.thing_prompts(label, CITYSCAPES_19.things, recipe))
    for class_id in CITYSCAPES_19.things:
        if (label == class_id).sum() <= 10:
            continue
        for mask in components(label == class_id):
            wanted = plain(label, mask) if mask.sum() >= 10 else None
            if wanted is not None:
                prompt = next(prompts)
                assert prompt.class_id == class_id
                np.testing.assert_allclose(prompt.box, wanted[0])
                np.testing.assert_allclose(prompt.points, wanted[1])
    assert next(prompts, None) is None


def test_a_class_of_ten_pixels_prompts_nothing():
    label = np.full((30, 30), IGNORE, np.uint8)
    label[:2, :5] = 13
    assert seco_sam.thing_prompts(label, (13,), "paper") == []
    label[2, 0] = 13
    assert len(seco_sam.thing_prompts(label, (13,), "paper")) == 1


def test_aligned_class_rules():
    """In release 0.20 must be exceeded."""
    for pixels, release, paper in (
        ({0: 21, 13: 79}, 0, IGNORE),
        ({0: 20, 13: 80}, IGNORE, IGNORE),
        ({2: 5, 8: 5}, 2, 2),
        ({}, IGNORE, IGNORE),
    ):
        counts = np.array([pixels.get(class_id, 0) for class_id in range(19)])
        for recipe, wanted in (("release", release), ("paper", paper)):
            assert seco_sam.aligned_class(counts, CITYSCAPES_19.stuff, recipe) == wanted


def test_overlaps_are_painted_over_or_filtered():
    first, second = torch.zeros(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    first[:, :4], second[:, 1:6] = True, True  # 12 of 20 pixels of the second are taken
    # The paper's recipe leaves the second out; in the release it is painted over the first.
    for recipe, of_first, of_second in (("release", 16 - 12, 20), ("paper", 16, 0)):
        painted = torch.full((4, 8), IGNORE, dtype=torch.uint8)
        seco_sam.paint(painted, first, 0, recipe)
        seco_sam.paint(painted, second, 1, recipe)
        assert [int((painted == c).sum()) for c in (0, 1)] == [of_first, of_second]
    second[:, 1:3] = False  # 4 of 12: the rest is painted, the first one stays
    seco_sam.paint(painted, second, 1, "paper")
    assert int((painted == 0).sum()) == 16 and int((painted == 1).sum()) == 8


def test_images_without_proposals_or_labels(sam):
    image, label = scene(5)
    none = ProposalSettings(points_per_side=2, predicted_iou=2.0)
    empty = np.full_like(label, IGNORE)
    result = psa(image, empty, FastSam(sam, settings=none))
    assert (result.label == IGNORE).all() and result.prompts == [] and result.aligned == []


def test_connectivities_of_the_ablations(sam):
    """Alone, alignment takes all classes by proposals and prompting prompts for all classes."""
    image, label = scene(6)
    aligned, prompted = (psa(image, label, few(sam), only=o) for o in ("alignment", "prompting"))
    assert aligned.prompts == [] and aligned.aligned and prompted.aligned == []
    assert {p.class_id for p in prompted.prompts} & set(CITYSCAPES_19.stuff)


def test_cached_proposals_give_the_same_labels(sam, tmp_path):
    """And SAM is not asked for them a second time, whatever the recipe."""
    image, label = scene(8)
    fast, reader = few(sam), few(sam)
    reader.proposals = None
    for recipe in ("release", "paper"):
        plain, made, taken = (
            psa(image, label, segmenter, recipe, cache=cache)
            for segmenter, cache in ((fast, None), (fast, tmp_path), (reader, tmp_path))
        )
        assert plain.aligned == made.aligned == taken.aligned
        assert (plain.label == taken.label).all() and (plain.label == made.label).all()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-30], whole[:90] + whole[99:], whole.replace(b"bits", b"pits")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name}: no whole mask proposals.*; remove the"):
            seco_sam.cached_proposals(reader, image, tmp_path)


def test_batches_decoded_side_by_side_give_what_one_thread_gives(sam):
    image, label = scene(9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            fast = few(sam, prompt_batch=5)
            results.append(psa(image, label, fast))
            assert (fast._map is map) == (threads == 1) and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[0].aligned == results[1].aligned and results[0].prompts
    assert (results[0].label == results[1].label).mean() >= 0.9999


def test_the_help_names_the_prompts_of_a_batch():
    cpu, gpu = (segmenter.Segmenter(torch.device(kind)).prompt_batch for kind in ("cpu", "cuda"))
    said = help_texts(seco_sam.Options)["prompt_batch"]
    assert f"(default: {cpu} on a CPU, {gpu} on a GPU)" in said


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_exhaustion_halves_the_prompt_batch(sam, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    image, label = scene(7)
    whole, halved = few(sam, prompt_batch=8), few(sam, prompt_batch=8)
    real = halved.decode

    def scarce(*prompts, **how):
        decode = real(*prompts, **how)

        def limited(start, stop):
            if stop - start > 3:
                raise torch.OutOfMemoryError("no memory")
            return decode(start, stop)

        return limited

    halved.decode = scarce
    results = [psa(image, label, segmenter).label for segmenter in (whole, halved)]
    assert halved.prompt_batch == 2 and (results[0] == results[1]).mean() >= 0.9999


def test_no_prompt_is_skipped_when_memory_runs_out_among_them():
    """The batch is halved inside `predict`: twenty prompts, each of a pixel of its own."""

    class Scarce:
        prompt_batch = 2

        def predict(self, boxes, points):
            self.prompt_batch = 1
            masks = torch.zeros(len(boxes), 1, 20, dtype=torch.bool)
            masks[torch.arange(len(boxes)), 0, torch.as_tensor(boxes[:, 0]).long()] = True
            return masks

    prompts = [seco_sam.Prompt(i % 19, np.full(4, i), np.zeros((1, 2))) for i in range(20)]
    like = torch.zeros(1, 20, dtype=torch.uint8)
    painted = seco_sam.prompt_things(Scarce(), prompts, like, "release")
    assert painted[0].tolist() == [p.class_id for p in prompts]


# -------------------------------------------------------------------------------------- the command


def make_root(root: Path, count: int = 4, size: tuple[int, int] = (48, 96)) -> Path:
    """A root with `count` images and labels of experiment `pix`; returns it."""
    rows = []
    (root / "images").mkdir(parents=True)
    for i in range(count):
        image, label = scene(i, *size)
        Image.fromarray(image).save(root / f"images/{i}.png")
        write_label(root / f"pix/{i}.png", label, CITYSCAPES_19.palette)
        rows.append((f"images/{i}.png", f"pix/{i}.png"))
    write_list(root / "splits/pix/all.txt", rows)
    return root


def command(root: Path, *more: str) -> list[str]:
    lists = ["--id-list-path", str(root / "splits/pix/all.txt"), "--root-path", str(root)]
    return [*lists, "--sam-type", "tiny", "--device", "cpu", *more]


load, EIGHT = seco_sam.load_segmenter, ProposalSettings(points_per_side=8)


def load_few(*arguments, settings=EIGHT):
    """The segmenter with few proposal points, to keep the tests short."""
    segmenter = load(*arguments)
    segmenter.settings = settings
    return segmenter


def run(root: Path, *more: str, **how) -> SimpleNamespace:
    """The command in this process. how: of `load_few`."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["seco_sam.py"])
        patch.setattr(seco_sam, "load_segmenter", partial(load_few, **how))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = run_main(lambda: seco_sam.main(command(root, *more)))
    return SimpleNamespace(code=code, out=out.getvalue(), error=error.getvalue())


FEW_POINTS = "import seco_sam, test_psa; seco_sam.load_segmenter = test_psa.load_few"


def outputs(root: Path) -> dict[str, bytes]:
    names = [*sorted((root / "pix_tiny").glob("*.png")), root / "splits/pix_tiny/all.txt"]
    return {path.name: path.read_bytes() for path in names}


def summary_of(root: Path, name: str = "summary") -> dict:
    return json.loads((root / f"pix_tiny/{name}.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root with the results of one uninterrupted process."""
    root = make_root(tmp_path_factory.mktemp("psa"))
    result = run(root, "--vis", "1")
    assert result.code == 0, result.error
    assert "\r" not in result.error  # no bar where nobody watches
    return root


@pytest.fixture
def finished(made, tmp_path):
    """A copy of it."""
    shutil.copytree(made, tmp_path / "finished")
    return tmp_path / "finished"


def test_outputs(finished):
    assert [line.split()[1] for line in open(finished / "splits/pix_tiny/all.txt")] == [
        f"pix_tiny/{i}.png" for i in range(4)
    ]
    summary = summary_of(finished)
    assert summary["images"] == 4 and 0 < summary["coverage_before"] < 100
    label = read_label(finished / "pix/0.png", 19)
    record = json.loads((finished / "pix_tiny/stats/0.png.json").read_text())
    assert record["labeled_before"] == (label != IGNORE).sum() < record["pixels"] == label.size
    assert json.loads((finished / "pix_tiny/settings.json").read_text())["sam_sha256"]
    assert summary["proposals_per_image"] > 0 < summary["seconds_per_image"]
    assert (finished / "pix_tiny/vis/0.png").is_file()


def test_a_finished_list_is_not_computed_again(finished):
    """But the image whose record is of an older form, which lacked a field, is."""
    before = {p: p.stat().st_mtime_ns for p in (finished / "pix_tiny").glob("*.png")}
    result = run(finished)
    assert result.code == 0 and "4 of 4 images are done" in result.out
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "pix_tiny").glob("*.png")}
    path = finished / "pix_tiny/stats/0.png.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in record if name != "kept"}))
    assert "3 of 4 images are done" in run(finished).out
    assert json.loads(path.read_text()).keys() == record.keys()


def test_two_processes_give_the_same_bytes(finished, tmp_path, monkeypatch):
    """The first waits for the second before it writes the list."""
    root, results = make_root(tmp_path), []
    code = f"import sys; sys.path.insert(0, 'tests'); {FEW_POINTS}; seco_sam.main()"
    first = lambda: results.append(run(root))
    beside_a_second(monkeypatch, first, "-c", code, *command(root))
    assert results[0].code == 0 and "waiting for the other processes" in results[0].out
    assert outputs(root) == outputs(finished) and summary_of(root)["images"] == 4


def test_killed_and_started_again_gives_the_same_bytes(finished, tmp_path):
    root = make_root(tmp_path)
    for name, calls, labels in (("write_label", 0, 0), ("write_json", 2, 2), ("write_label", 1, 3)):
        killed("seco_sam", name, calls, command(root), FEW_POINTS)
        assert len(list((root / "pix_tiny").glob("[0-9].png"))) == labels
    assert run(root).code == 0
    assert outputs(root) == outputs(finished)
    assert not list(root.rglob("*.tmp*"))


def test_limit_leaves_the_whole_list_alone(finished):
    before = outputs(finished), (finished / "pix_tiny/summary.json").read_bytes()
    assert run(finished, "--limit", "2").code == 0
    assert before == (outputs(finished), (finished / "pix_tiny/summary.json").read_bytes())
    lists = sorted(p.name for p in (finished / "splits/pix_tiny").iterdir())
    assert lists == ["all.txt", "all_first2.txt"]
    assert summary_of(finished, "summary_first2")["images"] == 2


# ------------------------------------------------------------------------------------------ --fill


def test_fill_keeps_pixel_labels_where_no_mask_is(finished):
    assert run(finished, "--fill", "pixel").code == 0
    for i in range(4):
        label, plain, filled = (
            read_label(finished / folder / f"{i}.png", 19)
            for folder in ("pix", "pix_tiny", "pix_tiny_fill")
        )
        assert ((plain == IGNORE) & (label != IGNORE)).any()
        assert (filled == np.where(plain == IGNORE, label, plain)).all()
    assert (finished / "splits/pix_tiny_fill/all.txt").is_file()
    settings = json.loads((finished / "pix_tiny_fill/settings.json").read_text())
    assert settings["fill"] == "pixel"


# ------------------------------------------------------ nothing stale, mixed, lost or overwritten


def test_what_made_a_label_may_not_change(finished):
    other = finished / "pix/2.png"
    for path in (finished / "images/0.png", finished / "pix/1.png"):
        kept = path.read_bytes()
        path.write_bytes((finished / f"{path.parent.name}/3.png").read_bytes())
        result = run(finished)
        assert result.code == 2 and f"{path}: has changed" in result.error
        path.write_bytes(kept)
    write_label(other, np.zeros((48, 96), np.uint8), CITYSCAPES_19.palette)
    (finished / "pix_tiny/2.png").unlink()  # asked for anew
    assert run(finished).code == 0
    record = json.loads((finished / "pix_tiny/stats/2.png.json").read_text())
    assert record["labeled_before"] == 48 * 96


def test_other_settings_are_never_mixed(finished):
    result = run(finished, "--amp", "bf16")
    assert result.code == 2 and "amp" in result.error
    assert run(finished, "--stuff", "0", "--things", "13").code == 2
    # Nor in a folder that holds results of other lists only.
    write_list(finished / "splits/pix/all.txt", [("images/3.png", "pix/3.png")])
    (finished / "pix_tiny/3.png").unlink()
    assert run(finished, "--stuff", "0", "--things", "13").code == 2


def test_equal_file_names_have_pictures_of_their_own(tmp_path):
    root, labels = make_root(tmp_path, 2), ("aachen/x.png", "bremen/x.png")
    for i, name in enumerate(labels):
        (root / "pix" / name).parent.mkdir()
        (root / f"pix/{i}.png").rename(root / "pix" / name)
    rows = [(f"images/{i}.png", f"pix/{name}") for i, name in enumerate(labels)]
    write_list(root / "splits/pix/all.txt", rows)
    assert run(root, "--vis", "2").code == 0
    first, second = (read_image(root / "pix_tiny/vis" / name) for name in labels)
    assert (first != second).any() and all((root / "pix_tiny" / n).is_file() for n in labels)


def rows_are(*rows: tuple[str, str]):
    return lambda root: write_list(root / "splits/pix/all.txt", list(rows))


@pytest.mark.parametrize(
    "change, said",
    [
        (rows_are(("images/0.png", "pix/../gt/0.png"), ("images/1.png", "pix/1.png")), "several"),
        (lambda root: (root / "gt").rename(root / "pix_tiny"), "has no settings.json"),
        (lambda root: (root / "pix_tiny").symlink_to(root / "gt"), "has no settings.json"),
        (rows_are(("pix_tiny/0.png", "pix/0.png")), "a plain folder name that no input has"),
        (rows_are(("images/0.png", "pix/vis/0.png")), "the results' own"),
    ],
)
def test_ground_truth_and_other_inputs_are_not_overwritten(tmp_path, change, said):
    root = make_root(tmp_path / "root", 2)
    for folder in ("gt", "../gt"):
        shutil.copytree(root / "pix", root / folder)
    change(root)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    result = run(root)
    assert result.code == 2 and said in result.error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")}


def nothing(root: Path) -> None:
    pass


def label_of_33(root: Path) -> None:
    write_label(root / "pix/2.png", np.full((48, 96), 33, np.uint8), CITYSCAPES_19.palette)


def upright_image(root: Path) -> None:
    Image.new("RGB", (48, 96)).save(root / "images/2.png")


@pytest.mark.parametrize(
    "break_it, arguments, said",
    [
        (lambda r: (r / "splits/pix/all.txt").unlink(), [], "no such list"),
        (lambda r: (r / "images/1.png").unlink(), [], "images/1.png"),
        (lambda r: (r / "pix/2.png").write_bytes(b"no picture"), [], "pix/2.png"),
        (label_of_33, [], "holds the value 33"),
        (nothing, ["--class-num", "7"], "--stuff and --things"),
        (nothing, ["--sam-checkpoint", "nowhere.pth"], "nowhere.pth"),
        (lambda r: (r / "pix_tiny").write_text("no folder"), [], "pix_tiny"),
        (upright_image, [], "pix/2.png: 96x48 pixels do not show the same as the 48x96"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, break_it, arguments, said):
    root = make_root(tmp_path, 3)
    break_it(root)
    result = run(root, *arguments)
    line = result.error.splitlines()[-1]
    assert result.code == 2 and said in line and line.startswith("error: ")
    assert not list(root.glob("pix_tiny/*.png"))
    assert not (root / "splits/pix_tiny/all.txt").exists()


# ---------------------------------------------------------------------- names, and what it tells


def test_a_name_of_its_own(finished):
    before = (finished / "pix_tiny/0.png").read_bytes()
    assert run(finished, "--recipe", "paper", "--exp", "other").code == 0
    assert (finished / "other/0.png").is_file() and (finished / "splits/other/all.txt").is_file()
    assert (finished / "pix_tiny/0.png").read_bytes() == before
    for name in ("pix", "images", "a/b"):
        result = run(finished, "--exp", name)
        assert result.code == 2 and f"--exp {name}: give a plain folder name" in result.error


def test_what_becomes_of_the_labeled_pixels_and_their_accuracy(finished):
    rows = [(f"images/{i}.png", f"pix/{i}.png") for i in range(4)]
    write_list(finished / "splits/gt.txt", rows)
    result = run(finished, "--gt", str(finished / "splits/gt.txt"))
    assert result.code == 0 and "accuracy of the labeled pixels: 100.0 % before" in result.out
    before, after = (
        np.stack([read_label(finished / f"{folder}/{i}.png") for i in range(4)])
        for folder in ("pix", "pix_tiny")
    )
    had, has = before != IGNORE, after != IGNORE
    kept, summary = had & (before == after), summary_of(finished)
    shares = summary["of_labeled_pixels"]
    assert shares["keep_their_class"] == pytest.approx(100 * kept.sum() / had.sum())
    assert shares["lose_it"] == pytest.approx(100 * (had & ~has).sum() / had.sum())
    assert sum(shares.values()) == pytest.approx(100)
    assert summary["accuracy_after"] == pytest.approx(100 * kept.sum() / (had & has).sum())


def test_a_segmenter_that_does_not_suit_is_doubted():
    few_kept, few_proposals = "under 50 % of the labeled pixels keep", "fewer than 3 proposals"
    for kept, proposals, words in (
        (48.4, 6, [few_kept]),
        (63.4, 6, []),
        (25.2, 1, [few_kept, few_proposals]),
        (80, 0, []),  # prompting alone
    ):
        shares = {"keep_their_class": kept}
        found = doubts({"of_labeled_pixels": shares, "proposals_per_image": proposals})
        assert len(found) == len(words)
        assert all(part in text for part, text in zip(words, found))


def test_classes_that_are_neither_stuff_nor_things_are_told(tmp_path):
    result = run(make_root(tmp_path, 1), "--stuff", "0", "--things", "13")
    assert result.code == 0 and "warning: sidewalk, building" in result.error
