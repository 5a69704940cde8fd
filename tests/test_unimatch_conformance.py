"""UniMatch beside the authors' code: tests/data/unimatch/iterations.json has losses and learning
rates of three iterations of its own loop (LiheYoung/UniMatch at 0324f3d) in float64, on inputs and
weights that tests/conformance.py computes. And beside plain implementations of its description:
OHEM by sorting, a learning rate set after each step, torch's own sampler for four processes.
"""

import json

import numpy as np
import pytest
import torch
from conformance import DATA, formula_state, hashed, read_keys
from torch.utils.data import DistributedSampler

import train_unimatch
from dataset.samples import Lists, TrainingSamples
from model.losses import ohem_cross_entropy
from model.resnet import IMAGENET_MEAN, IMAGENET_STD
from model.training import learning_rate
from tests.reference_train import ohem_by_sorting
from util.labels import CITYSCAPES_19

SIZE, BATCH, ITERATIONS = 65, 2, 3
OPTIONS = "--labeled-id-path - --unlabeled-id-path - --save-path - --backbone resnet50"
OPTIONS += " --conf-thresh 0.12 --ohem-threshold 0.05 --min-kept 1000 --lr 0.001 --lr-multi 10"
OPTIONS += f" --global-batch {BATCH} --batch-per-process {BATCH} --loss-groups 1"
# The fixture's names, ours, and the relative differences that float32 in the losses leaves.
NAMES = {
    "total_loss": "loss_all",
    "total_loss_x": "loss_x",
    "total_loss_s": "loss_s",
    "total_loss_w_fp": "loss_w_fp",
    "total_mask_ratio": "mask_ratio",
}
DIFFERENCES = (1e-6, 1e-6, 1e-3)


def blocks(name: str, *channels: int) -> np.ndarray:
    """uint8 SIZE x SIZE (x channels), hashed from a name: every value a block of 8 x 8 pixels."""
    shape = (9, 9, *channels)
    values = (hashed(name, int(np.prod(shape))) >> 24).astype(np.uint8).reshape(shape)
    return values.repeat(8, axis=0).repeat(8, axis=1)[:SIZE, :SIZE]


def batch_of(iteration: int, corners: list) -> dict[str, torch.Tensor]:
    """What dataset.samples makes: strong views pasted into already. corners: (top, bottom, left,
    right) of the two boxes of the iteration, which the views share in turn.
    """

    def views(name):
        return np.stack([blocks(f"{name} {iteration} {b}", 3) for b in range(BATCH)])

    boxes = np.zeros((BATCH, SIZE, SIZE), dtype=bool)
    for box, (top, bottom, left, right) in zip(boxes, corners):
        box[top:bottom, left:right] = True
    ignore = np.zeros((2, BATCH, SIZE, SIZE), dtype=bool)
    ignore[:, 0, 60:] = True
    ignore[1, 1, :, 55:] = True
    masks = np.stack([blocks(f"mask {iteration} {b}") for b in range(BATCH)])
    arrays = {name: views(name) for name in ("x", "w", "w_mix")}
    arrays["mask_x"] = np.where(masks < 40, 255, masks % 19).astype(np.uint8)
    arrays["ignore"], arrays["ignore_mix"] = ignore
    arrays["box1"], arrays["box2"] = boxes, boxes[::-1].copy()
    for name, box in (("s1", arrays["box1"]), ("s2", arrays["box2"])):
        arrays[name] = np.where(box[..., None], views(f"{name}_mix"), views(name))
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def factors_of(_, iteration: int, count: int, channels) -> tuple[torch.Tensor, ...]:
    """In the place of `perturbation_factors`."""
    found = []
    for name, number in zip(("c1", "c4"), channels):
        kept = hashed(f"{name} {iteration}", 2 * count * number) >> 31
        found.append(torch.from_numpy(2.0 * kept).view(2, count, number, 1, 1))
    return tuple(found)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return ((images.double() / 255 - mean) / deviation).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def iterations():
    """(the fixture, [(logged values, learning rates)] of our iterations, the network after)."""
    fixture = json.loads((DATA / "unimatch/iterations.json").read_text(encoding="utf-8"))
    args = train_unimatch.parse_args(OPTIONS.split())
    lists = Lists([], ["-"], [], np.zeros((0, 19)))
    trainer = train_unimatch.Trainer(args, CITYSCAPES_19, lists, torch.device("cpu"))
    trainer.model.double().load_state_dict(formula_state(read_keys("unimatch_r50")))
    trainer.total = ITERATIONS
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_unimatch, "perturbation_factors", factors_of)
        patch.setattr(train_unimatch, "normalised", normalised)
        for number, corners in enumerate(fixture["boxes_y0_y1_x0_x1"]):
            batches = iter([batch_of(number, corners)])
            logged, _ = trainer.iteration(number, batches)
            found.append((logged, [group["lr"] for group in trainer.optimizer.param_groups]))
    return fixture, found, trainer.model.state_dict()


@pytest.mark.parametrize("number", range(ITERATIONS))
def test_losses_and_learning_rates_are_the_authors(iterations, number):
    expected, (logged, rates) = iterations[0]["iterations"][number], iterations[1][number]
    assert rates == expected["lr"]
    assert {NAMES[name]: value for name, value in expected.items() if name != "lr"} == (
        pytest.approx(logged, rel=DIFFERENCES[number])
    )


def test_weights_after_three_iterations_are_the_authors(iterations):
    fixture, _, state = iterations
    for name, (total, largest) in fixture["after"].items():
        values = state[name]
        assert float(values.abs().max()) == pytest.approx(largest, rel=1e-2), name
        assert float(values.sum()) == pytest.approx(total, rel=1e-2, abs=1e-2), name


@pytest.mark.parametrize("seed", range(19))
@pytest.mark.parametrize("min_kept, unlabeled", [(100, 0.2), (1500, 0.2), (1500, 0.9)])
def test_ohem_is_that_of_sorting(seed, min_kept, unlabeled):
    """Mined by the threshold, by the number to keep, and not at all; 57 cases with 16 and 19
    classes.
    """
    random, class_num = torch.Generator().manual_seed(seed), (16, 19)[seed % 2]
    logits = (2 * torch.randn(2, class_num, 30, 40, generator=random)).requires_grad_()
    labels = torch.randint(0, class_num, (2, 30, 40), generator=random)
    labels[torch.rand(labels.shape, generator=random) < unlabeled] = 255
    found, gradients = [], []
    for loss_of in (ohem_cross_entropy, ohem_by_sorting):
        loss = loss_of(logits, labels, 0.7 if seed % 3 else 0.1, min_kept)
        gradients += torch.autograd.grad(loss, logits)
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert torch.equal(gradients[0] != 0, gradients[1] != 0)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("total", [1, 7, 240])
@pytest.mark.parametrize("base", [0.001, 0.005])
def test_the_learning_rate_is_set_after_the_step(total, base):
    rate = base
    for iteration in range(total):
        assert learning_rate(iteration, total, base) == rate
        rate = base * (1 - iteration / total) ** 0.9


@pytest.mark.parametrize("images, batch", [(37, 2), (40, 2), (9, 1)])
def test_an_iteration_has_the_images_of_four_processes(images, batch):
    """The loaders drop an epoch's last, incomplete batch."""
    args = train_unimatch.parse_args([*OPTIONS.split(), "--global-batch", str(4 * batch)])
    samples = TrainingSamples(args, Lists([], images * ["-"], [], np.zeros((0, 19))))
    iteration = 0
    for epoch in range(3):
        shares = []
        for rank in range(4):
            sampler = DistributedSampler(range(images), 4, rank, shuffle=True, seed=0)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
        for start in range(0, len(shares[0]) - batch + 1, batch):
            together = [index for share in shares for index in share[start : start + batch]]
            numbers = range(4 * batch * iteration, 4 * batch * (iteration + 1))
            assert sorted(map(samples.index, numbers)) == sorted(together)
            iteration += 1
    assert iteration == 3 * samples.per_epoch
