"""eval.py: windows, modes, means, label maps, processes; beside slow oracles and the official
Cityscapes evaluation."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from processes import beside_a_second
from torch.nn.functional import pad

from eval import confusion_matrix, main, metrics_of, sliding_scores, sliding_windows, table
from model.deeplabv3plus import DeepLabV3Plus
from model.network import load_network
from model.resnet import to_tensor
from util.labels import CITYSCAPES_19, SYNTHIA_16, read_label, write_label, write_list
from util.outputs import Outputs
from util.run import run_main

# --------------------------------------------------------------------------------------- prediction


def test_windows_are_the_released_ones():
    """1024 x 2048 with 769 (stride 512): cut at the border, not shifted back."""
    rows, columns = [(0, 769), (512, 1024)], [(0, 769), (512, 1281), (1024, 1793), (1536, 2048)]
    expected = [(slice(*row), slice(*column)) for row in rows for column in columns]
    assert sliding_windows(1024, 2048, 769) == expected
    assert sliding_windows(100, 100, 801) == [(slice(0, 100), slice(0, 100))]
    assert {row.start for row, _ in sliding_windows(1024, 2048, 801)} == {0, 534}


class Patchy(torch.nn.Module):
    """A network whose output at a pixel depends on the whole window that it is shown."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 5, 5, padding=2)
        self.shapes = []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return 3 * self.convolution(images) * images.mean(dim=(1, 2, 3), keepdim=True) + images.std(
            dim=(2, 3), keepdim=True
        ).sum(1, True)


def sliding_slowly(model, image, size):
    """UniMatch's loop: one window after the other, softmax summed."""
    height, width = image.shape[-2:]
    total, row = None, 0
    while row < height:
        column = 0
        while column < width:
            window = image[:, :, row : min(row + size, height), column : min(column + size, width)]
            scores = model(window).softmax(dim=1)
            total = torch.zeros(1, scores.shape[1], height, width) if total is None else total
            total[:, :, row : row + size, column : column + size] += scores
            column += int(size * 2 / 3)
        row += int(size * 2 / 3)
    return total


@pytest.mark.parametrize("height, width, size", [(60, 110, 45), (64, 64, 48), (50, 41, 60)])
def test_sliding_window_equals_the_plain_loop(height, width, size):
    model, image = Patchy(), torch.randn(1, 3, height, width)
    with torch.no_grad():
        expected = sliding_slowly(model, image, size)
        model.shapes.clear()
        scores = sliding_scores(model, image, size)
    torch.testing.assert_close(scores, expected)
    windows = sliding_windows(height, width, size)
    assert sum(shape[0] for shape in model.shapes) == len(windows)
    assert max(shape[0] for shape in model.shapes) <= 4
    if len(windows) > 4:
        assert len(model.shapes) < len(windows)  # windows of one shape share a pass


# ------------------------------------------------------------------------------------------ figures


def random_maps(random, shape, class_num, missing=0.0):
    truth = random.integers(0, class_num, shape).astype(np.uint8)
    other = random.integers(0, class_num, shape)
    prediction = np.where(random.random(shape) < 0.6, truth, other).astype(np.uint8)
    truth[random.random(shape) < 0.1] = 255
    prediction[random.random(shape) < missing] = 255
    return truth, prediction


def iou_slowly(truth, prediction, class_id):
    """Over pixels with ground truth; a missing prediction is a wrong one."""
    counted = truth != 255
    hit = (counted & (truth == class_id) & (prediction == class_id)).sum()
    union = (counted & ((truth == class_id) | (prediction == class_id))).sum()
    return 100 * hit / union if union else None


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_figures_equal_counting_class_by_class(missing):
    """With two classes absent from the ground truth, of which one (train, 16) is predicted."""
    truth, prediction = random_maps(np.random.default_rng(0), (60, 80), 19, missing)
    prediction[np.isin(prediction, (14,)) | np.isin(truth, (14,))] = 0
    truth[np.isin(truth, (14, 16))] = 255
    prediction[:2] = 16
    truth[:2] = 3
    metrics = metrics_of(confusion_matrix(truth, prediction, 19), CITYSCAPES_19.names)
    expected = [iou_slowly(truth, prediction, class_id) for class_id in range(19)]
    assert list(metrics["iou"].values()) == pytest.approx(expected)
    assert expected[14] is None and expected[16] == 0 and metrics["absent"] == ["truck", "train"]
    counted = np.array([value or 0 for value in expected])
    sixteen = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18]
    thirteen = [c for c in sixteen if c not in (3, 4, 5)]
    assert metrics["miou"] == pytest.approx(counted.mean())
    assert metrics["miou_present"] == pytest.approx(np.delete(counted, [14, 16]).mean())
    assert metrics["miou_16"] == pytest.approx(counted[sixteen].mean())
    assert metrics["miou_13"] == pytest.approx(counted[thirteen].mean())
    labeled = (truth != 255) & (prediction != 255)
    assert metrics["coverage"] == pytest.approx(100 * labeled.sum() / (truth != 255).sum())
    assert metrics["accuracy"] == pytest.approx(100 * (truth == prediction)[labeled].mean())
    text = table(metrics, "header")
    for name, words in (
        ("miou", "over all 19 classes, one absent"),
        ("miou_present", "over the 17 classes present"),
        ("miou_16", "over SYNTHIA's 16"),
        ("miou_13", "over SYNTHIA's 13"),
    ):
        assert f"mIoU {metrics[name]:.2f} %  {words}" in text
    assert "absent from the ground truth" in text


def test_sixteen_classes():
    truth, prediction = random_maps(np.random.default_rng(1), (40, 40), 16)
    metrics = metrics_of(confusion_matrix(truth, prediction, 16), SYNTHIA_16.names)
    values = np.delete([*metrics["iou"].values()], (3, 4, 5))
    assert metrics["miou_13"] == pytest.approx(values.mean()) and "miou_16" not in metrics


def test_iou_equals_the_official_evaluation(tmp_path):
    """Package cityscapesscripts, on label maps of official IDs, its own pixel counting and class
    table.
    """
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    from cityscapesscripts.helpers.labels import labels as official_labels
    from cityscapesscripts.helpers.labels import trainId2label

    to_id = np.zeros(256, dtype=np.uint8)
    for train_id in range(19):
        to_id[train_id] = trainId2label[train_id].id
    random, confusion, pairs = np.random.default_rng(2), 0, []
    for number in range(3):
        truth, prediction = random_maps(random, (64, 96), 19)
        truth[truth == 16] = 255  # a class that is predicted, but not there
        confusion = confusion + confusion_matrix(truth, prediction, 19)
        files = [str(tmp_path / f"{number}_{name}.png") for name in ("prediction", "truth")]
        for path, values in zip(files, (prediction, truth)):
            Image.fromarray(to_id[values]).save(path)
        pairs.append(files)
    args = official.args
    args.quiet, args.evalInstLevelScore = True, False
    args.evalPixelAccuracy = args.JSONOutput = False
    result = official.evaluateImgLists(*map(list, zip(*pairs)), args)
    ours = metrics_of(confusion, CITYSCAPES_19.names)["iou"]
    names = {label.trainId: label.name for label in official_labels if 0 <= label.trainId < 19}
    assert [names[i] for i in range(19)] == list(CITYSCAPES_19.names)
    theirs = [result["classScores"][name] for name in CITYSCAPES_19.names]
    values = np.array([np.nan if value is None else value / 100 for value in ours.values()])
    np.testing.assert_allclose(values, theirs, atol=1e-6)
    # its average takes every class with a pixel in the ground truth or a false positive
    assert np.nanmean(values) == pytest.approx(result["averageScoreClasses"], abs=1e-6)


# ------------------------------------------------------------------------------------------ command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images with ground truth, label maps of two, a checkpoint of 19 classes; lists val.txt
    and labels.txt.
    """
    root, random = tmp_path_factory.mktemp("eval"), np.random.default_rng(3)
    rows, labels = [], []
    for number in range(3):
        truth, prediction = random_maps(random, (50, 70), 19, 0.2)
        name = f"val/city/{number}.png"
        for folder in ("images", "gt", "exp"):
            (root / folder / "val/city").mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "images" / name)
        write_label(root / "gt" / name, truth, CITYSCAPES_19.palette)
        rows.append((f"images/{name}", f"gt/{name}"))
        if number < 2:
            write_label(root / "exp" / name, prediction, CITYSCAPES_19.palette)
            labels.append((f"images/{name}", f"exp/{name}"))
    write_list(root / "val.txt", rows)
    write_list(root / "labels.txt", labels)
    torch.manual_seed(0)
    model = DeepLabV3Plus(10, 19)
    torch.save({"model": model.state_dict(), "config": model.config}, root / "model.pth")
    return root


def arguments(data, *more):
    argv = f"--id-list-path {data}/val.txt --root-path {data} --device cpu"
    return [*argv.split(), *map(str, more)]


def test_labels_from_a_list_or_a_folder(data, tmp_path, capsys):
    main(arguments(data, "--labels", data / "labels.txt", "--out", tmp_path / "list"))
    out = capsys.readouterr().out
    assert "1 of them have no label map and count as unlabeled" in out and "coverage" in out
    main(arguments(data, "--labels", data / "exp", "--out", tmp_path / "folder"))
    maps = [
        [read_label(data / folder / f"val/city/{n}.png") for n in range(count)]
        for folder, count in (("gt", 3), ("exp", 2))
    ]
    truth, prediction = np.stack(maps[0]), np.stack([*maps[1], np.full((50, 70), 255, np.uint8)])
    files = [tmp_path / name / "metrics.json" for name in ("list", "folder")]
    by_list, by_folder = (json.loads(path.read_text()) for path in files)
    assert by_list == by_folder
    confusion = confusion_matrix(truth, prediction, 19)
    expected = metrics_of(confusion, CITYSCAPES_19.names)
    assert {name: by_list[name] for name in expected} == expected
    assert (by_list["images"], by_list["mode"]) == (3, "labels")
    lines = (tmp_path / "list/confusion.csv").read_text().splitlines()
    counts = [[int(cell) for cell in line.split(",")[1:]] for line in lines[1:]]
    assert np.array_equal(counts, confusion)
    assert Image.open(tmp_path / "list/confusion.png").width > 300


@pytest.mark.parametrize(
    "mode, values, kind",
    [
        ("original", "train-ids", "P"),
        ("sliding_window", "label-ids", "L"),
        ("center_crop", "colour", "RGB"),
        ("square_windows", "train-ids", "P"),
    ],
)
def test_figures_and_predictions_of_a_network(data, mode, values, kind, capsys, tmp_path):
    """In every mode and form of the predictions, which have the images' own size."""
    official = pytest.importorskip("cityscapesscripts.helpers.labels").trainId2label
    table = np.zeros((256, 3) if values == "colour" else 256, int)
    table[255] = 255 if values == "train-ids" else 0
    for c in range(19):
        table[c] = {"P": c, "L": official[c].id, "RGB": official[c].color}[kind]
    how = ("--mode", mode, "--crop-size", 40, "--out", tmp_path / "out", "--predictions", tmp_path)
    argv = arguments(data, "--checkpoint", data / "model.pth", *how, "--prediction-values", values)
    main(argv)
    assert f"mode {mode}" in capsys.readouterr().out
    model, confusion = load_network(data / "model.pth", "cpu", 19).model, 0
    for number in range(3):
        image = to_tensor(np.asarray(Image.open(data / f"images/val/city/{number}.png")))[None]
        truth, label = read_label(data / f"gt/val/city/{number}.png"), np.full((50, 70), 255)
        seen = (slice(5, 45), slice(15, 55)) if mode == "center_crop" else ...
        with torch.no_grad():
            if mode == "sliding_window":
                scores = sliding_slowly(model, image, 40)
            elif mode == "square_windows":  # two of 50x50; logits added up have the mean's argmax
                scores = pad(model(image[..., :50]), (0, 20)) + pad(model(image[..., 20:]), (20, 0))
            else:
                scores = model(image[(..., *seen)] if mode == "center_crop" else image)
        label[seen] = scores.argmax(dim=1)[0].numpy()
        confusion = confusion + confusion_matrix(truth[seen], label[seen], 19)
        with Image.open(tmp_path / f"images/val/city/{number}.png") as found:
            assert found.mode == kind and (np.asarray(found) == table[label]).mean() > 0.999
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    expected = metrics_of(confusion, CITYSCAPES_19.names)["miou"]
    assert metrics["miou"] == pytest.approx(expected, rel=1e-3) and metrics["mode"] == mode


@pytest.mark.parametrize("what", ["checkpoint", "labels"])
def test_a_finished_evaluation_is_not_made_again(data, tmp_path, monkeypatch, what, capsys):
    """Nothing is measured, the same table is printed; a change of what it was made from counts."""
    monkeypatch.setattr("eval.confusion_chart", lambda *_: None)  # which takes long
    monkeypatch.setattr("eval.save_chart", lambda path, _: path.touch())
    shutil.copytree(data, tmp_path / "data")
    data, out = tmp_path / "data", tmp_path / "out"
    of = {"checkpoint": data / "model.pth", "labels": data / "exp"}[what]
    argv = arguments(data, f"--{what}", of, "--out", out)

    def measured(*more) -> bool:
        before = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*")}
        main([*argv, *map(str, more)])
        printed.append(capsys.readouterr().out)
        return before != {path: path.stat().st_mtime_ns for path in out.glob("[!.]*")}

    printed: list[str] = []
    assert measured() and not measured() and printed[0] == printed[1]
    assert json.loads((out / "run.json").read_text())["cost"]["seconds"] > 0
    truth, image = data / "gt/val/city/0.png", data / "images/val/city/0.png"
    for path in (truth, data / "exp/val/city/1.png" if what == "labels" else image):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
        assert measured() and not measured()
    assert measured("--mode", "center_crop", "--crop-size", 40)
    assert measured() and not measured()
    for name in ("run.json", "metrics.json"):  # as a kill in the middle leaves it
        (out / name).unlink()
        assert measured() and not measured()


def test_predictions_resume_and_are_not_mixed(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    unchanged, data, out = data / "model.pth", tmp_path / "data", tmp_path / "out"
    (data / "val.txt").write_text("".join(f"images/val/city/{n}.png\n" for n in range(3)))
    argv = arguments(data, "--checkpoint", data / "model.pth", "--predictions", out)

    def told(*more) -> str:
        """The error that ends the command."""
        assert run_main(lambda: main([*argv, *map(str, more)])) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    main(argv)
    printed = capsys.readouterr().out
    assert f"3 label maps in {out}" in printed and "IoU" not in printed
    files = sorted(out.glob("images/**/*.png"))
    content = [path.read_bytes() for path in files]
    files[1].unlink()
    before = [path.stat().st_mtime_ns for path in (files[0], files[2])]
    main(argv)
    main(argv)
    assert [path.read_bytes() for path in files] == content
    assert [path.stat().st_mtime_ns for path in (files[0], files[2])] == before
    assert capsys.readouterr().out == 2 * printed
    for gone in (False, True):  # of a finished folder, and of one that is not
        if gone:
            files[1].unlink()
        assert "mode = original, now it is center_crop" in told("--mode", "center_crop")
        assert "prediction_values = train-ids, now" in told("--prediction-values", "colour")
        torch.save(torch.load(data / "model.pth") | {"epoch": 1}, data / "model.pth")
        assert "model.pth: has changed since" in told()
        shutil.copy(unchanged, data / "model.pth")
    write_label(tmp_path / "other/a.png", np.zeros((2, 2), np.uint8), ())
    argv[-1] = str(tmp_path / "other")
    assert "but has no settings.json" in told()
    with Outputs(tmp_path / "held"):
        argv[-1] = str(tmp_path / "held")
        assert "another run is writing there" in told()
    (data / "val.txt").write_text("images/a.png\nimages/a.jpg\n")
    assert "a.png: would be the prediction of images/a.png and of images/a.jpg" in told()


def test_two_processes_give_the_figures_of_one(data, tmp_path, monkeypatch, capsys):
    """Three images on two processes: none is counted or predicted twice, and one table printed."""
    argv = arguments(
        data, "--checkpoint", data / "model.pth", "--mode", "sliding_window", "--crop-size", 40
    )
    together = [*argv, "--out", str(tmp_path / "two"), "--predictions", str(tmp_path / "maps")]
    second = beside_a_second(monkeypatch, lambda: main(together), "eval.py", *together)
    assert second == "" and capsys.readouterr().out.count("over all 19 classes") == 1
    main([*argv, "--out", str(tmp_path / "one"), "--predictions", str(tmp_path / "map")])
    for path in (data / "images").glob("**/*.png"):
        name = path.relative_to(data)
        assert (tmp_path / "map" / name).read_bytes() == (tmp_path / "maps" / name).read_bytes()
    for name in ("metrics.json", "confusion.csv", "confusion.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_label_maps_of_equal_names_are_told_apart(data, tmp_path, capsys):
    """In two cities they are two maps, of which one has twice the ground truth's size; two images
    of which a folder has one map are refused.
    """
    for folder in ("images", "gt", "exp"):
        shutil.copytree(data / folder / "val/city", tmp_path / folder / "val/city")
        shutil.copytree(data / folder / "val/city", tmp_path / folder / "val/other")
    wrong = np.repeat(np.arange(19), 50 * 70 // 19 + 1)[: 50 * 70].reshape(50, 70)
    large = wrong.repeat(2, axis=0).repeat(2, axis=1)
    write_label(tmp_path / "exp/val/other/0.png", large, CITYSCAPES_19.palette)
    shutil.copytree(tmp_path / "images", tmp_path / "more")
    rows = [(f"images/val/{city}/0.png", f"gt/val/{city}/0.png") for city in ("city", "other")]
    write_list(tmp_path / "val.txt", rows)
    main(arguments(tmp_path, "--labels", tmp_path / "exp", "--out", tmp_path / "out"))
    truth = np.stack([read_label(tmp_path / path) for _, path in rows])
    maps = np.stack([read_label(tmp_path / "exp/val/city/0.png"), wrong])
    ious = json.loads((tmp_path / "out/metrics.json").read_text())["iou"]
    assert list(ious.values()) == pytest.approx([iou_slowly(truth, maps, c) for c in range(19)])
    write_list(tmp_path / "val.txt", [rows[0], ("more/val/city/0.png", "gt/val/city/1.png")])
    assert run_main(lambda: main(arguments(tmp_path, "--labels", tmp_path / "exp"))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "label map of images/val/city/0.png and of more/val/city/0.png" in error
    (tmp_path / "exp/val/city/0.png").unlink()  # then neither has one
    twins = [rows[0], ("more/val/city/0.png", "gt/val/city/1.png")]
    write_list(tmp_path / "val.txt", [rows[1], *twins])
    main(arguments(tmp_path, "--labels", tmp_path / "exp"))
    assert "2 of them have no label map" in capsys.readouterr().out


def test_bad_input_is_told_in_one_line(data, tmp_path, capsys):
    for name, shape in {"bad": (50, 70), "small": (25, 35), "turned": (70, 50)}.items():
        label = np.full(shape, 33 if name == "bad" else 0, np.uint8)
        write_label(data / f"gt/{name}.png", label, CITYSCAPES_19.palette)
    lists = {
        "gone": "images/val/city/0.png gt/gone.png\n",
        "bad": "images/val/city/0.png gt/bad.png\n",
        "small": "images/val/city/0.png gt/small.png\n",
        "columns": "images/val/city/0.png\n",
        "mixed": "images/val/city/0.png\nimages/val/city/1.png gt/small.png\n",
        "others": "images/val/city/9.png exp/val/city/0.png\n",
        "turned": "images/val/city/0.png gt/turned.png\n",
    }
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "file").write_text("")
    model = ("--checkpoint", data / "model.pth")
    predictions = (*model, "--predictions", tmp_path / "p")
    cases = [
        (("--checkpoint", tmp_path / "no.pth"), None, "no.pth: no such checkpoint"),
        (("--checkpoint", tmp_path / "file"), None, "not a checkpoint of tensors"),
        ((*model, "--class-num", 16), None, "predicts 19 classes, but --class-num is 16"),
        ((*model, "--crop-size", 5), None, "--crop-size 5: give 33 or more"),
        ((*model, "--out", tmp_path / "file/out"), None, "file/out: cannot write there"),
        (model, "gone", "gt/gone.png: no such file, named in"),
        (model, "bad", "bad.png: holds the value 33"),
        (model, "small", "small.png: 35x25 pixels do not show the same as the 70x50"),
        (model, "turned", "turned.png: 50x70 pixels do not show the same as the 70x50"),
        ((*predictions, "--out", tmp_path), "columns", "line 1: 1 columns where 2 are wanted"),
        (predictions, "mixed", "some lines lack a ground truth"),
        (("--labels", tmp_path, *predictions[2:]), None, "give --checkpoint, not --labels"),
        ((*predictions, "--prediction-values", "label-ids", "--class-num", 16), None, "19 classes"),
        (("--labels", tmp_path / "no.txt"), None, "no.txt: no such list file"),
        (("--labels", tmp_path / "others.txt"), None, "has none of the images of"),
        (("--labels", data / "gt/val"), None, "has none of the images of"),
        (("--labels", tmp_path / "turned.txt"), None, "turned.png: 50x70 pixels do not show"),
        ((*model, "--labels", tmp_path), None, "--checkpoint or --labels: give one of them"),
        ((), None, "--checkpoint or --labels: give one of them"),
    ]
    for options, name, message in cases:
        argv = arguments(data, *options)
        if name:
            argv[1] = str(tmp_path / f"{name}.txt")
        assert run_main(lambda: main(argv)) == 2, options
        captured = capsys.readouterr()
        error = captured.err.replace("\r", "\n").strip().splitlines()
        assert error[-1].startswith("error: ") and message in error[-1], (options, error[-1])
        assert "Traceback" not in captured.err and captured.out == ""
