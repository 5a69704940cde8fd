"""train_unimatch.py: its iteration beside tests/reference_train.py, resuming, processes, logs, bad
input. Losses and schedule beside the authors' code: tests/test_unimatch_conformance.py."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import beside_a_second, warm_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluation
import train_unimatch
import util.run
from dataset.samples import Lists, loading_processes
from model import train_logs
from model.losses import balanced_cross_entropy, class_weights, total_loss
from model.train_logs import best_and_last
from model.training import learning_rate, perturbation_factors
from scripts.dev import bench
from tests.reference_train import plain_losses, random_batch
from train_unimatch import main
from util.labels import CITYSCAPES_19, write_label, write_list
from util.run import run_main
from util.training_log import read_events, read_text_log, read_training_log

LOGS = json.loads((ROOT / "tests/data/shipped_logs.json").read_text())
EPOCHS, LR = 240, 0.005  # of all three shipped logs


@pytest.mark.parametrize("name", LOGS)
def test_learning_rate_is_the_one_printed_at_every_epoch_start(name):
    """One step late: a schedule that is on time does not give the printed figures."""
    printed, (low, high) = LOGS[name]["lr"], LOGS[name]["iterations_per_epoch"]
    assert len(printed) >= 56
    for length in range(low, high + 1):
        rates = [learning_rate(epoch * length, EPOCHS * length, LR) for epoch in range(EPOCHS)]
        assert [round(rate, 5) for rate in rates[: len(printed)]] == printed
    on_time = [round(LR * (1 - epoch / EPOCHS) ** 0.9, 5) for epoch in range(len(printed))]
    assert (on_time == printed) == (name == "seco_bdd")  # whose epochs are too long to tell


@pytest.mark.parametrize("name", LOGS)
def test_loss_identity_holds_for_every_shipped_row(name):
    """Off by 0.0005 x (1 + (1 + 0.5 + 0.5) / 2) at most: all values have three decimals."""
    rows = read_training_log(ROOT / "training_logs" / name).losses
    assert len(rows) > 500
    total, x, s, w_fp = (
        np.array([values[loss] for _, _, values in rows])
        for loss in ("loss_all", "loss_x", "loss_s", "loss_w_fp")
    )
    assert np.abs(total_loss(x, s, s, w_fp) - total).max() <= 0.001 + 1e-9


def test_balanced_loss_and_class_weights():
    """Two of three labeled pixels of class 0, one of class 1, none of class 2."""
    weights = class_weights(np.array([2, 1, 0]), 0.5)
    by_hand = torch.tensor([(2 / 3) ** -0.5, (1 / 3) ** -0.5, 0])
    torch.testing.assert_close(weights, by_hand / (by_hand * torch.tensor([2, 1, 0]) / 3).sum())
    assert torch.equal(class_weights(np.array([2, 1, 0]), 0.0), torch.tensor([1.0, 1, 0]))
    logits = torch.randn(1, 3, 1, 4, requires_grad=True)
    of_pixels = -logits[0, [0, 0, 1], 0, [0, 1, 2]] + logits.logsumexp(1)[0, 0, :3]
    expected = (of_pixels * weights[[0, 0, 1]]).sum() / weights[[0, 0, 1]].sum()
    labels = torch.tensor([[[0, 0, 1, 255]]])
    torch.testing.assert_close(balanced_cross_entropy(logits, labels, weights), expected)
    nothing = balanced_cross_entropy(logits, torch.full_like(labels, 255), weights)
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


@pytest.mark.parametrize("processes, group", [(1, 2), (2, 2), (4, 2), (8, 1)])
def test_loss_groups_are_the_authors_processes(processes, group, monkeypatch, capsys):
    """Two samples each; eight processes cannot count together."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    how = {"global_batch": 8, "batch_per_process": 8 // processes, "loss_groups": 4}
    trainer = small_trainer(**how)
    train_logs.announce(trainer)
    said = capsys.readouterr().out
    assert trainer.group == group and f"losses are normalised in {8 // group} groups" in said
    assert ("warning: 8 groups, not 4" in said) == (processes == 8)


def small_trainer(**options):
    argv = "--labeled-id-path - --unlabeled-id-path - --save-path - --backbone resnet10".split()
    argv += "--crop-size 64 --global-batch 3 --batch-per-process 3 --loss-groups 1".split()
    args = train_unimatch.parse_args(changed([*argv, "--min-kept", "300"], **options))
    lists = Lists([], ["-"], [], np.zeros((0, 19)))
    return train_unimatch.Trainer(args, CITYSCAPES_19, lists, torch.device("cpu"))


def flat_factors(iteration, batch):
    return tuple(f.flatten(0, 1) for f in perturbation_factors(0, iteration, batch, (32, 256)))


@pytest.mark.parametrize("groups, conf_thresh", [(1, 0.0), (3, 0.077)])
def test_losses_and_gradients_equal_the_literal_iteration(groups, conf_thresh):
    """Of plain_losses, which follows the released step."""
    batch, factors = random_batch(3, 64, 19, seed=1), flat_factors(0, 3)
    one, other = (small_trainer(loss_groups=groups, conf_thresh=conf_thresh) for _ in range(2))
    loss, values, _ = one.unimatch_losses(batch, factors)
    loss.backward()
    plain = plain_losses(other.model, batch, factors, other.args, other.group)
    plain["loss_all"].backward()
    assert values.keys() == {*plain, "mask_ratio"}
    for name in plain:
        assert values[name].item() == pytest.approx(plain[name].item(), rel=1e-5), name
    kept = values["mask_ratio"].item()
    assert 0 < kept <= 1 and (kept == 1) == (conf_thresh == 0)
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    # the same images went through batch norm
    for (name, a), b in zip(one.model.named_buffers(), other.model.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_crops_without_a_label_and_of_padding_alone_stay_finite():
    trainer, batch = small_trainer(loss_groups=3), random_batch(3, 64, 19, seed=2)
    batch["mask_x"][:] = 255
    batch["ignore"][0] = batch["ignore_mix"][0] = True
    loss, values, _ = trainer.unimatch_losses(batch, flat_factors(0, 3))
    loss.backward()
    assert values["loss_x"].item() == 0 and all(math.isfinite(v.item()) for v in values.values())
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters())


def test_perturbation_does_not_depend_on_the_distribution():
    """Half of the channels are dropped, the rest doubled; by seed and iteration alone."""
    c1, c4 = perturbation_factors(0, 5, 4, (32, 256))
    assert c1.shape == (2, 4, 32, 1, 1) and c4.shape == (2, 4, 256, 1, 1)
    assert set(c4.unique().tolist()) == {0.0, 2.0} and abs(c4.mean().item() - 1) < 0.1
    assert not torch.equal(c4[0, 0], c4[0, 1]) and not torch.equal(c4[0], c4[1])
    assert torch.equal(c1, perturbation_factors(0, 5, 4, (32, 256))[0])
    assert not torch.equal(c1, perturbation_factors(0, 6, 4, (32, 256))[0])
    assert not torch.equal(c1, perturbation_factors(1, 5, 4, (32, 256))[0])


def test_optimizer_is_unimatchs_or_adamw_at_the_same_rates():
    trainer, adamw = small_trainer(lr_multi=10), small_trainer(optimizer="adamw").optimizer
    backbone, rest = trainer.optimizer.param_groups
    assert isinstance(adamw, torch.optim.AdamW)
    assert len(backbone["params"]) + len(rest["params"]) == len(list(trainer.model.parameters()))
    ids = {id(p) for p in trainer.model.backbone.parameters()}
    assert {id(p) for p in backbone["params"]} == ids
    for group in (backbone, rest):
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four labeled images (one label is smaller), seven unlabeled, two with ground truth; lists."""
    root, random = tmp_path_factory.mktemp("unimatch"), np.random.default_rng(0)

    def noise(most, shape):
        values = random.integers(0, most, (9, 14, *shape), dtype=np.uint8)
        return values.repeat(8, axis=0).repeat(8, axis=1)

    def image(name):
        path = root / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(256, (3,))).save(path)
        return f"images/{name}.png"

    def label(folder, name):
        values = noise(19, ())
        values[:8] = 255
        values = values[::2, ::2] if name == "x3" else values
        write_label(root / folder / f"{name}.png", values, CITYSCAPES_19.palette)
        return f"{folder}/{name}.png"

    labeled = [(image(f"x{i}"), label("corrected", f"x{i}")) for i in range(4)]
    validation = [(image(f"v{i}"), label("ground_truth", f"v{i}")) for i in range(2)]
    write_list(root / "labeled.txt", labeled)
    write_list(root / "unlabeled.txt", [(image(f"u{i}"),) for i in range(7)])
    write_list(root / "val.txt", validation)
    return root


def command(data, save, *more, val=True, epochs=2):
    """The options of a run of 2 x 4 iterations at 40 pixels."""
    argv = f"--labeled-id-path {data}/labeled.txt --unlabeled-id-path {data}/unlabeled.txt"
    argv += f" --root-path {data} --save-path {save} --backbone resnet10 --crop-size 40"
    argv += f" --global-batch 2 --epochs {epochs} --workers 0 --device cpu --lr 0.001"
    argv += " --checkpoint-every 1" + (f" --val-id-path {data}/val.txt" if val else "")
    return [*argv.split(), *map(str, more)]


def changed(argv, **options):
    """argv with other options: the last counts."""
    words = ([f"--{n.replace('_', '-')}", *str(value).split()] for n, value in options.items())
    return [*argv, *chain(*words)]


def error_of(argv, capsys) -> str:
    """The one line on stderr that a command ends with."""
    assert run_main(lambda: main(argv)) == 2, argv
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """A run that nothing stopped."""
    save = tmp_path_factory.mktemp("whole") / "run"
    main(command(data, save))
    return save


def scalars_of(folder: Path) -> dict:
    """{tag: [(step, value)]} of TensorBoard's files."""
    events = EventAccumulator(str(folder), purge_orphaned_data=False)
    events.Reload()
    # Files of one second are read in the order of their process IDs: sorted here by step.
    tags = events.Tags()["scalars"]
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in tags}


def text_without_clock(folder: Path) -> str:
    return re.sub(r"\[[^]]*\]\[ +INFO\]|'save_path': .*", "", (folder / "train.log").read_text())


def assert_same_run(one: Path, other: Path):
    """Weights, statistics, momentum, progress and logs: nothing twice or missing, bit for bit."""
    for name in ("latest.pth", "best.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        for content in (a, b) if name == "latest.pth" else ():
            assert content.pop("logs") and content["progress"].pop("seconds") > 0
        for part in ("model", "optimizer"):
            torch.testing.assert_close(a.pop(part, {}), b.pop(part, {}), rtol=0, atol=0)
        assert a == b
    assert text_without_clock(one) == text_without_clock(other)
    scalars = scalars_of(one)
    assert scalars == scalars_of(other) and len(scalars["eval/mIoU"]) > 1


@pytest.mark.parametrize("iteration", [0, 2, 4])
def test_stopped_and_resumed_equals_uninterrupted(
    data, whole_run, tmp_path, monkeypatch, iteration
):
    """Stopped before anything was saved, in the middle of an epoch, and after an epoch's end."""
    usual = train_unimatch.Trainer.iteration

    def stops(self, number, *rest):
        if number == iteration:
            raise RuntimeError("stopped")
        return usual(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_unimatch.Trainer, "iteration", stops)
        with pytest.raises(RuntimeError, match="stopped"):
            main(command(data, tmp_path / "run"))
    main(command(data, tmp_path / "run", "--workers", 1))
    assert_same_run(tmp_path / "run", whole_run)


def test_a_full_disk_loses_nothing(data, whole_run, tmp_path, monkeypatch, capsys):
    """PyTorch's error of a failed write is a RuntimeError."""
    usual, saved = torch.save, []

    def fails(content, path):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 57 vs 56")
        usual(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        assert "the disk is full; make room" in error_of(command(data, tmp_path / "run"), capsys)
    main(command(data, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole_run)


def test_a_failed_start_does_not_block_the_corrected_command(data, tmp_path, capsys):
    """Nor does a start that failed count where a run goes on: its settings are kept."""
    argv = command(data, tmp_path / "run", "--checkpoint-every", 0, val=False, epochs=1)
    assert "a loss is not finite" in error_of(changed(argv, lr=1e30), capsys)
    assert not (tmp_path / "run/latest.pth").exists()
    main(argv)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["lr"] == 0.001
    rows = [row[:2] for row in read_training_log(tmp_path / "run").losses]
    assert rows == [(0, i) for i in range(4)]  # nothing of the failed start
    error = error_of(changed(argv, lr=0.01), capsys)
    assert "holds results of lr = 0.001, now it is 0.01" in error
    assert "remove that folder, or choose another" in error


@pytest.mark.parametrize("name", ["corrected/x1.png", "images/x2.png", "images/u3.png"])
def test_what_a_run_was_made_from_may_not_change(data, whole_run, name, capsys):
    """Turned upside down: pixels per class are as before."""
    kept, before = (data / name).read_bytes(), (whole_run / "latest.pth").read_bytes()
    Image.open(data / name).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(data / name)
    try:
        error = error_of(command(data, whole_run), capsys)
    finally:
        (data / name).write_bytes(kept)
    assert f"{data / name}: has changed since the results in {whole_run} were made" in error
    assert (whole_run / "latest.pth").read_bytes() == before


KILLED = """
import os, signal, sys
import train_unimatch
usual = train_unimatch.Trainer.save
def save(self, name, epoch):
    if self.state.iteration == 4 and name == "latest.pth":
        self.logs.sizes()  # the evaluation is on disk, the checkpoint of this epoch is not
        os.kill(os.getpid(), signal.SIGKILL)
    usual(self, name, epoch)
train_unimatch.Trainer.save = save
train_unimatch.main(sys.argv[1:])
"""


def test_killed_and_resumed_equals_uninterrupted(data, whole_run, tmp_path):
    """SIGKILL between an evaluation and its checkpoint. Nothing is logged twice."""
    save = tmp_path / "run"
    argv = command(data, save, "--eval-every", 1)
    killed = subprocess.run([warm_python(), "-c", KILLED, *argv], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "MeanIoU" in (save / "train.log").read_text()
    assert torch.load(save / "latest.pth", weights_only=True)["progress"]["iteration"] == 3
    main(argv)
    assert_same_run(save, whole_run)


def test_a_finished_run_is_left_alone(data, whole_run, capsys):
    def times():
        return {path: path.stat().st_mtime_ns for path in whole_run.glob("[!.]*")}

    before = times()
    main(command(data, whole_run))
    assert "complete" in capsys.readouterr().out
    assert before == times() and len(before) > 8


def test_training_from_few_images(data, tmp_path, monkeypatch, capsys):
    """As the embedded benchmark's source model; progress in plain lines where nobody watches."""
    monkeypatch.setattr(util.run, "SECONDS_BETWEEN_LINES", 1e-9)
    few = "--optimizer adamw --class-balance 0.4 --scales 0.75 1.5".split()
    argv = command(data, tmp_path / "run", *few, epochs=1)
    main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert len(lines) == 4 and re.match(
        r"training: 3/4 it, +\S+, \d\d:\d\d left, epoch 0, loss \d\.\d{3}, best", lines[2]
    )
    error = error_of([*argv, "--scales", "0.5", "2"], capsys)
    assert "scales = [0.75, 1.5], now it is [0.5, 2.0]" in error


def test_logs_of_a_run(whole_run):
    """Events as the released code's, a text log as the shipped ones, summary.json, pictures."""
    scalars = scalars_of(whole_run)
    losses = ("loss_all", "loss_x", "loss_s", "loss_w_fp", "mask_ratio")
    ious = {f"eval/{name}_IoU" for name in CITYSCAPES_19.names}
    tags = {f"train/{name}" for name in (*losses, "lr")}
    assert scalars.keys() == {*tags, "eval/mIoU", *ious}
    assert all([step for step, _ in scalars[tag]] == list(range(8)) for tag in tags)
    rates = [rate for _, rate in scalars["train/lr"]]
    assert rates == pytest.approx([learning_rate(i, 8, 0.001) for i in range(8)])
    total, x, s, fp, kept = (np.array(scalars[f"train/{name}"])[:, 1] for name in losses)
    assert total == pytest.approx((x + 0.5 * s + 0.5 * fp) / 2, rel=1e-5) and (kept == 1).all()

    log = read_text_log(whole_run / "train.log")
    assert log.config["crop_size"] == 40 and log.config["criterion"]["name"] == "OHEM"
    text = (whole_run / "train.log").read_text()
    assert all(f"> Epoch: {epoch}, LR: {rates[4 * epoch]:.5f}, " in text for epoch in (0, 1))
    assert [row[:2] for row in log.losses] == [(epoch, i) for epoch in range(2) for i in range(4)]
    assert log.losses[-1][2] == pytest.approx(
        {name: np.mean([v for _, v in scalars[f"train/{name}"][4:]]) for name in losses}, abs=5e-4
    )
    latest, best = (
        torch.load(whole_run / name, weights_only=True) for name in ("latest.pth", "best.pth")
    )
    found = {e: metrics["miou"] for e, metrics in latest["progress"]["evaluations"].items()}
    assert dict(scalars["eval/mIoU"]) == pytest.approx(found)
    assert log.miou == {epoch: round(miou, 2) for epoch, miou in found.items()}
    assert read_events(whole_run).miou == pytest.approx(found)
    assert best["epoch"] == max(found, key=found.get)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["mIoU"] == {**best_and_last(found), "eval_mode": "original"}
    assert (summary["epochs"], summary["iterations"]) == (2, 8)

    manifest = json.loads((whole_run / "manifest.json").read_text())
    assert {"command", "options", "versions", "commit", "hardware", "cost"} <= manifest.keys()
    inputs = json.loads((whole_run / "inputs.json").read_text())
    assert inputs.keys() > {"labeled", "unlabeled", "val"}
    assert manifest["cost"]["seconds"] >= latest["progress"]["seconds"] > 0
    assert manifest["iterations_per_epoch"] == 4
    for name, width in (("pictures/epoch_001.png", 500), ("curves.png", 100)):
        assert Image.open(whole_run / name).width > width


def test_curves_show_evaluations_or_else_losses(monkeypatch):
    drawn, losses = [], {0: 2.0, 1: 1.5}
    monkeypatch.setattr(train_logs, "save_chart", lambda path, chart: None)
    monkeypatch.setattr(train_logs, "line_chart", lambda series, *rest: drawn.append(series))
    train_logs.curves_picture(Path("x"), {4: 34.0, 9: 44.0}, losses)
    train_logs.curves_picture(Path("x"), {}, losses)
    assert drawn == [{"validation": ([4, 9], [34.0, 44.0])}, {"loss_all": ([0, 1], [2.0, 1.5])}]


def test_checkpoint_evaluates_to_the_logged_figures(data, whole_run, capsys):
    argv = f"--checkpoint {whole_run}/latest.pth --id-list-path {data}/val.txt --root-path {data}"
    evaluation.main([*argv.split(), "--device", "cpu"])
    last = json.loads((whole_run / "summary.json").read_text())["mIoU"]["last"]
    assert f"mIoU {last:.2f} %  over all 19" in capsys.readouterr().out


def test_training_opens_no_ground_truth(data, tmp_path, monkeypatch):
    """Images and corrected labels alone, without a validation list. With copy-paste, the source's
    weights, bf16 and accumulation.
    """
    source, opened, usual = tmp_path / "source", [], Image.open
    argv = command(data, source, "--supervised", val=False, epochs=1)
    del argv[2:4]  # --unlabeled-id-path
    main(argv)
    monkeypatch.setattr(
        Image, "open", lambda path, *rest: opened.append(str(path)) or usual(path, *rest)
    )
    more = f"--init-checkpoint {source}/latest.pth --copy-paste --amp bf16 --batch-per-process 1"
    main(command(data, tmp_path / "run", *more.split(), val=False, epochs=1))
    folders = {Path(path).relative_to(data).parts[0] for path in opened}
    assert folders == {"images", "corrected"}
    assert (tmp_path / "run/latest.pth").exists() and not (tmp_path / "run/best.pth").exists()
    assert json.loads((tmp_path / "run/summary.json").read_text())["mIoU"] is None


def test_dry_run_reports_and_leaves_nothing(data, tmp_path, capsys):
    main(command(data, tmp_path / "run", "--dry-run", "--batch-per-process", 1))
    out = capsys.readouterr().out
    assert "global batch 2 = 1 process x 1 samples x 2 accumulation steps" in out
    assert "warning: batch norm sees 1 samples" in out and "two iterations: loss_all" in out
    assert "projected time of 8 iterations and 4 images to evaluate (original, " in out
    assert "peak memory" in out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there, runs", [(989, False), (991, True)])
def test_dry_run_runs_only_what_has_room(data, tmp_path, monkeypatch, capsys, there, runs):
    """100 + 0.5 x pixels MB are 900 at 40 pixels, 990 with the margin."""

    def small(run, crop):
        memory = {"host_mb": 100 + 0.5 * crop**2}
        return {"memory": memory, "computing": 2 + 0.01 * crop**2}

    monkeypatch.setattr(train_unimatch, "measured_alone", small)
    monkeypatch.setattr(train_logs, "SMALL_CROPS", {"cpu": (33, 37)})
    monkeypatch.setattr(train_logs, "memory_here", lambda device: there)
    assert run_main(lambda: main(command(data, tmp_path / "run", "--dry-run"))) == 0
    out = capsys.readouterr().out
    assert "measured at --crop-size 37: 0.8 GB, 15.69 s computing an iteration" in out
    estimate = "estimate for --crop-size 40: 0.9 GB, this machine has 1.0 GB; 18.00 s computing"
    assert f"{estimate} an iteration\n" in out
    refusal = "not run: use --batch-per-process 1, --amp bf16 or a smaller --crop-size\n"
    assert out.endswith(refusal) != runs and ("losses after two iterations" in out) == runs
    assert list(tmp_path.iterdir()) == []


def test_dry_run_estimates_what_it_then_measures(data, tmp_path):
    """Measured in processes of their own, so not beside what this one has held."""
    argv = changed(command(data, tmp_path / "run", "--dry-run", val=False), crop_size=177)
    run = [sys.executable, str(ROOT / "train_unimatch.py"), *argv]
    out = subprocess.run(run, check=True, capture_output=True, text=True, timeout=180).stdout
    estimate = float(re.search(r"estimate for --crop-size 177: ([\d.]+) GB", out)[1])
    measured = float(re.search(r"peak memory of process 0: host (\d+) MB", out)[1]) / 1e3
    assert 0.8 < estimate / measured < 1.25


def test_as_many_loading_processes_as_cores_at_most_four(monkeypatch):
    found = []
    for cores in (2, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), False)
        found.append([loading_processes(wanted) for wanted in (None, 0, 7)])
    assert found == [[2, 0, 7], [4, 0, 7]]


GRADIENTS = """
import functools
import sys
sys.path.insert(0, {root!r})
import torch
import train_unimatch as t
from util.labels import chosen_classes
from util.run import process_group, process_rank
args, (rank, world) = t.parse_args({command!r}), process_rank()
args.batch_per_process = 1 if world == 2 else 4
lists, cpu = t.read_lists(args), torch.device("cpu")
frozen, found = lambda model: type(model).train(model, False), {{}}


def first_steps():
    run = t.Trainer(args, chosen_classes(args), lists, cpu)
    run.network = t.training.distributed(run.network, cpu)
    loader = iter(t.batches(run.samples, range(2), 0, cpu))
    step, run.optimizer.step, model = run.optimizer.step, lambda: None, run.model
    model.train = lambda mode=True: frozen(model)  # batch norm frozen
    model.eval()
    name = "compiled" if args.compile else "values"
    found[name], _ = run.iteration(0, loader)
    if not args.compile:
        found["gradients"] = {{name: p.grad.clone() for name, p in model.named_parameters()}}
        del model.train
        model.train()
        run.optimizer.step = step
        run.iteration(1, loader)  # a whole step, batch norm learning
        found["after"] = model.state_dict()


with process_group(cpu):
    for args.compile in (False, True)[:world]:
        torch.compile = functools.partial(torch.compile, backend="eager")
        first_steps()
torch.save(found, f"{out}/{{world}}_{{rank}}.pt")
"""


def test_two_processes_give_the_gradients_of_one(data, tmp_path, monkeypatch):
    """Batch norm frozen; the two accumulate as well. After a step with batch norm learning both
    hold the same network. A compiled network runs as well.
    """
    script, argv = tmp_path / "gradients.py", command(data, tmp_path / "run", val=False, epochs=1)
    argv = changed(argv, min_kept=100, global_batch=4)
    script.write_text(GRADIENTS.format(root=str(ROOT), command=argv, out=str(tmp_path)))
    beside_a_second(monkeypatch, lambda: runpy.run_path(str(script)), str(script))
    runpy.run_path(str(script))
    names = ("1_0.pt", "2_0.pt", "2_1.pt")
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in names)
    for name, value in one["values"].items():
        assert first["values"][name] == second["values"][name]
        assert first["values"][name] == pytest.approx(value, rel=1e-5), name
        assert first["compiled"][name] == pytest.approx(value, rel=1e-5), name
    for name, gradient in one["gradients"].items():
        ours, scale = first["gradients"][name], gradient.abs().max().item()
        assert torch.equal(ours, second["gradients"][name])
        close = {"rtol": 1e-3, "atol": 1e-5 * scale + 1e-9}
        torch.testing.assert_close(ours, gradient, **close, msg=name)
    assert all(torch.equal(first["after"][name], second["after"][name]) for name in first["after"])


BAD = {"batch_per_process": 3, "loss_groups": 3, "crop_size": 32, "seed": -1, "lr": -1.0}
BAD |= {"copy_paste_classes": 99, "class_balance": 2.0, "conf_thresh": 2.0, "device": "gpu"}
BAD |= {"global_batch": 0, "epochs": 0, "eval_every": 0}


def test_bad_input_is_told_in_one_line(data, whole_run, tmp_path, capsys):
    shapes = {"bad": (72, 112), "nothing": (72, 112), "turned": (112, 72), "small": (36, 56)}
    for name, shape in shapes.items():
        label = np.full(shape, {"bad": 33, "nothing": 255}.get(name, 0), np.uint8)
        write_label(data / f"corrected/{name}.png", label, CITYSCAPES_19.palette)
    for name in (*shapes, "gone"):
        (tmp_path / f"{name}.txt").write_text(f"images/x0.png corrected/{name}.png\n")
    (tmp_path / "both.txt").write_text("images/u0.png\n./images/x1.png\n")
    (tmp_path / "file").write_text("")
    fresh, missing = command(data, tmp_path / "run"), tmp_path / "no.pth"
    twenty = {"class_num": 20, "stuff": 0, "things": 1}
    cases = [
        ({"labeled_id_path": tmp_path / "no.txt"}, "no.txt: no such list file"),
        ({"labeled_id_path": tmp_path / "gone.txt"}, "corrected/gone.png: no such file, named in"),
        ({"labeled_id_path": tmp_path / "bad.txt"}, "bad.png: holds the value 33"),
        ({"labeled_id_path": tmp_path / "nothing.txt"}, "nothing can be learned"),
        ({"labeled_id_path": tmp_path / "turned.txt"}, "turned.png: 72x112 pixels do not show"),
        ({"val_id_path": tmp_path / "bad.txt"}, "bad.png: holds the value 33"),
        (
            {"val_id_path": tmp_path / "small.txt"},
            "56x36 pixels do not show the same as the 112x72",
        ),
        ({"unlabeled_id_path": tmp_path / "both.txt"}, "images/x1.png: in "),
        ({"init_checkpoint": missing}, "no.pth: no such checkpoint"),
        ({"init_checkpoint": whole_run / "latest.pth", **twenty}, "1 differ, first: size mismatch"),
        ({"backbone_weights": missing}, "no.pth: no such checkpoint"),
        ({"backbone": "resnet18", "backbone_weights": "imagenet"}, "--stem torchvision"),
        ({"save_path": tmp_path / "file" / "run"}, "file/run: cannot write there"),
        ({"scales": "0 1"}, "--scales 0.0: give a number above 0"),
        ({"photometric": ""}, "--photometric: only with --supervised"),
        ({"supervised": ""}, "--unlabeled-id-path or --supervised: give one of them"),
        *(({name: value}, f"--{name.replace('_', '-')} {value}") for name, value in BAD.items()),
    ]
    for options, message in cases:
        assert message in error_of(changed(fresh, **options), capsys), options
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_is_told_in_one_line(data, tmp_path, monkeypatch, capsys):
    """Also from a loader process, whose errors come as tracebacks."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # not 5 seconds
    (data / "images/cut.png").write_bytes((data / "images/u0.png").read_bytes()[:-200])
    (tmp_path / "unlabeled.txt").write_text("images/cut.png\n")
    argv = command(data, tmp_path / "run", val=False)
    argv = changed(argv, unlabeled_id_path=tmp_path / "unlabeled.txt", workers=1)
    assert "cut.png: the image cannot be read" in error_of(argv, capsys)


@pytest.mark.slow
def test_benchmarks_run_and_print_ratios(capsys, monkeypatch):
    how, cpu = {"backbone": "resnet18", "crop_size": 64, "batch": 2}, torch.device("cpu")
    variants = bench.train(bench.Options(part="train", steps=1, **how), cpu)
    seconds = bench.data(bench.Options(part="data", samples=6), cpu)
    for name, small in {"FILES": 1, "TIMES": 20, "CUTS": 2, "BATCHES": 2}.items():
        monkeypatch.setattr(bench, name, small)
    bench.scc(bench.Options(part="scc"), cpu)
    out = capsys.readouterr().out
    rows = ("| plain fp32 |", "| bf16 channels-last |", "| ours, --image-cache |", "in 20 images")
    for row in rows:
        assert row in out
    assert seconds["plain"] > 4 * seconds["ours, --image-cache"]
    assert len(variants) == 4
