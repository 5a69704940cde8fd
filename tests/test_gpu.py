"""The GPU's results beside the CPU's (marked gpu: skipped where there is none), and the command
that measures on a GPU, in miniature."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from PIL import Image
from torch import nn

import seco_scc
from dataset.scc import mask_shares
from dataset.toy import SPLITS, draw_scene, make_toy
from eval import evaluate_checkpoint
from model import scc
from model.deeplabv3plus import DeepLabV3Plus
from model.network import Network
from model.sam import load_segmenter
from model.training import perturbation_factors
from scripts.dev import bench, gpu
from seco_sam import aggregate
from tests.reference_train import random_batch
from util.labels import CITYSCAPES_19, write_label
from util.outputs import read_json
from util.run import UserError, exact_mode, seed_everything

DEVICES = ("cpu", "cuda")

# ------------------------------------------------------------------------------ on a CUDA device


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["release", "paper"])
def test_psa_gives_the_cpu_s_labels(recipe):
    exact_mode()
    scene = draw_scene(3, "target")
    label = bench.pixel_labels(scene.label, 0)
    here, there = (
        aggregate(
            scene.image, label, load_segmenter("tiny", device=name), CITYSCAPES_19, recipe
        ).label
        for name in DEVICES
    )
    assert (here == there).mean() >= 0.999


@pytest.mark.gpu
def test_a_unimatch_step_has_the_cpu_s_losses():
    options = bench.Options(part="train", backbone="resnet10", crop_size=65, min_kept=300)
    batch, losses = random_batch(2, 65, 19, 0), []
    factors = perturbation_factors(0, 0, 2, (32, 256))
    for name in DEVICES:
        trainer = bench.trainer_for("fp32", options, torch.device(name))
        loss, _, _ = trainer.unimatch_losses(dict(batch), [f.flatten(0, 1) for f in factors])
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad.isfinite().all() for p in trainer.model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["release", "paper"])
def test_scc_has_the_cpu_s_logits(recipe):
    exact_mode()
    how = ["--id-list-path", "-", "--backbone", "resnet10", "--recipe", recipe, "--device", "cpu"]
    options = seco_scc.parse_args(how)
    seed_everything(0)
    model = scc.make_classifier(options, 19, torch.device("cpu")).eval()
    images = torch.randint(0, 256, (2, 64, 128, 3), dtype=torch.uint8)
    second = torch.randint(0, 2, (2, 1, 32, 64), dtype=torch.uint8)
    if recipe == "paper":
        numbers = np.arange(64 * 128).reshape(64, 128) // 2048
        second = [mask_shares(numbers, 4, (64, 128)) for _ in range(2)]
    with torch.inference_mode():
        here, there = (
            scc.logits_of(model.to(name), images, second, torch.device(name), False).cpu()
            for name in DEVICES
        )
    assert torch.allclose(here, there, rtol=1e-3, atol=1e-3 * float(here.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["original", "sliding_window"])
def test_evaluation_has_the_cpu_s_confusion(mode, tmp_path):
    """But for a pixel here and there whose two best classes are as likely."""
    exact_mode()
    scene = draw_scene(0, "target")
    Image.fromarray(scene.image).save(tmp_path / "image.png")
    write_label(tmp_path / "truth.png", scene.label, CITYSCAPES_19.palette)
    seed_everything(0)
    network = Network(DeepLabV3Plus(10, 19).eval(), "DeepLabV3+", 19)
    found = []
    for name in DEVICES:
        network.model.to(name)
        rows = [("image.png", "truth.png")]
        found.append(evaluate_checkpoint(network, rows, tmp_path, mode, 129))
    here, there = found
    assert np.abs(here - there).sum() <= 2 * 0.001 * here.sum()


@pytest.mark.gpu
def test_nccl_sums_and_averages(tmp_path):
    how = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", **how)
    try:
        ones = torch.ones(1000, device="cuda")
        dist.all_reduce(ones)
        model = nn.parallel.DistributedDataParallel(nn.Linear(1000, 1).cuda(), [0])
        model(ones).sum().backward()
        assert int(ones.sum()) == 1000 and bool((model.module.weight.grad == 1).all())
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_training_on_drawn_scenes_under_torchrun(tmp_path):
    lists = make_toy(tmp_path, 0, dict(zip(SPLITS, (4, 4, 2)))) / "lists"
    options = {"labeled-id-path": lists / "source_train.txt", "save-path": tmp_path / "run"}
    options |= {"unlabeled-id-path": lists / "target_train.txt", "root-path": tmp_path}
    options |= {"val-id-path": lists / "target_val.txt", "epochs": 1, "backbone": "resnet10"}
    options |= {"crop-size": 65, "global-batch": 2, "workers": 1, "device": "cuda"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([*launch, "train_unimatch.py", *words], cwd=ROOT, check=True)
    assert (tmp_path / "run/latest.pth").is_file()


# ------------------------------------------------------------------- scripts/dev/gpu.sh, on a CPU


def test_a_case_that_fails_leaves_the_others_and_alone_runs_again(tmp_path, monkeypatch):
    """Figures of another card are not mixed in."""
    begun = []

    def run(case, size, device):
        begun.append(case)
        if case == "tf32" and len(begun) < 4:
            raise RuntimeError("CUDA error:\nout of luck")
        return {"iterations/s": 2.0, "GB": 1.0}

    monkeypatch.setattr(torch, "compile", torch.compile)  # is set for a CPU
    monkeypatch.setitem(gpu.PARTS, "scc", (run, *gpu.PARTS["scc"][1:]))
    how = ["scc", "--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main(how) == 1 and begun == ["fp32", "tf32", "bf16"]
    text = (tmp_path / "gpu.md").read_text()
    assert "| bf16 | 2 iterations/s | 1.0 |" in text and "| bf16 compile | not run |" in text
    assert "| tf32 | RuntimeError: CUDA error: |" in text
    assert gpu.main(how) == 0 and begun[3:] == ["tf32"]
    assert "Error" not in (tmp_path / "gpu.md").read_text()
    monkeypatch.setattr(gpu, "settings_of", lambda _: {"card": "another"})
    with pytest.raises(UserError, match="holds results of card = .*, now it is another"):
        gpu.main(how)


def all_parts(out, limit) -> subprocess.CompletedProcess:
    command = ["bash", "scripts/dev/gpu.sh", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LIMIT": limit}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_part_that_hangs_leaves_the_others(tmp_path):
    said = all_parts(tmp_path, "0.1")
    assert said.returncode == 1 and said.stdout.count("took too long") == len(gpu.PARTS) + 1


@pytest.mark.slow
def test_every_part_runs_in_miniature(tmp_path):
    said = all_parts(tmp_path, "600")
    text = (tmp_path / "gpu.md").read_text()
    assert said.returncode == 0 and "Error" not in text and "not run" not in text, said.stdout


def test_the_readme_has_the_recorded_table():
    text = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
    record = read_json(ROOT / "training_logs/ours/gpu/gpu.json")
    assert gpu.table(record["parts"], gpu.FULL).strip() in text
