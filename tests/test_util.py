"""What the scripts share: paths and lists, reading of images and labels, processes."""

import contextlib
import errno
import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin
from processes import beside_a_second, warm_python

from util import run as shown
from util.labels import (
    IGNORE,
    check_pairs,
    check_same_shape,
    image_size,
    read_image,
    read_label,
    read_list,
)
from util.run import (
    PACKAGES,
    RENDEZVOUS_SECONDS,
    WORK_SECONDS,
    UserError,
    manifest,
    run_main,
    select_device,
)

# --- lists and paths


def write(path, text):
    path.write_text(text)
    return path


def test_paths_of_a_list_come_back_short(tmp_path):
    path = write(tmp_path / "l.txt", "./images/a/../b.png pix/../pix/./b.png\n")
    assert read_list(path) == [("images/b.png", "pix/b.png")]


BELOW, AGAIN = "line 1: .* does not lie below --root-path", "line 2: .* is in line 1 already"


@pytest.mark.parametrize(
    "lines, told",
    [
        ("images/0.png /etc/x.png", BELOW),
        ("images/0.png ../x.png", BELOW),
        ("images/0.png pix/../../evil/0.png", BELOW),
        ("images/0.png ..", BELOW),
        ("images/0.png C:/x", BELOW),
        ("a.png q/a.png\na.png q/b.png", AGAIN),
        ("a.png q/a.png\nb.png q/a.png", AGAIN),
        ("a.png q/a.png\n./a.png q/c.png", AGAIN),
    ],
)
def test_odd_rows_of_a_list_are_refused(tmp_path, lines, told):
    with pytest.raises(UserError, match=told):
        read_list(write(tmp_path / "l.txt", lines + "\n"))


# --- images and labels


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_floating_point_images_are_refused(tmp_path):
    path = saved(tmp_path / "f.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(UserError, match=r"f\.tif: an image of floating-point values"):
        read_image(path)


def test_16_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = read_image(saved(tmp_path / "g.png", values))
    assert image[..., 0].tolist() == [[0, 1, 128, 255]] and image.shape == (1, 4, 3)


def test_exif_turned_pictures_are_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    path = saved(tmp_path / "p.png", pixels, exif=exif)
    image = read_image(path)
    assert image.shape == (16, 8, 3) and image_size(path) == (16, 8)
    assert image[0].min() == 255 and image[-1].max() == 0


@pytest.mark.parametrize("kind", ["jpeg", "rgb", "truncated", "text", "16-bit"])
def test_labels_of_another_kind_are_refused_in_a_line(tmp_path, kind):
    path = tmp_path / ("l.jpg" if kind == "jpeg" else "l.png")
    label = np.random.default_rng(0).integers(0, 19, (64, 64)).astype(np.uint8)
    if kind == "rgb":
        Image.fromarray(np.stack([label] * 3, -1)).save(path)
    elif kind == "16-bit":
        Image.fromarray(label.astype(np.uint16)).save(path)
    else:
        Image.fromarray(label).save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    if kind == "text":
        path.write_text("label")
    with pytest.raises(UserError, match="l\\.(png|jpg): ") as error:
        read_label(path, 19)
    assert "\n" not in str(error.value)


def test_whatever_the_image_library_raises_is_one_line(tmp_path):
    """A PNG whose text is too large to unpack: not one of the library's own exceptions."""
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    path = saved(tmp_path / "t.png", np.zeros((4, 4), np.uint8), pnginfo=text)
    told = r"t\.png: the .* cannot be read \(Decompressed (?i:data)"
    for read in (read_image, read_label, image_size):
        with pytest.raises(UserError, match=told):
            read(path)


@pytest.mark.parametrize(
    "other, same",
    [
        *((size, True) for size in ((512, 1024), (129, 257), (1024, 2048), (256, 512), (341, 683))),
        *((size, False) for size in ((2048, 1024), (1024, 2000), (512, 512), (720, 1280))),
    ],
)
def test_maps_of_one_scene_have_one_aspect_ratio(other, same):
    refused = pytest.raises(UserError, match=f"{other[1]}x{other[0]}")
    for pair in (((1024, 2048), other), (other, (1024, 2048))):
        with contextlib.nullcontext() if same else refused:
            check_same_shape("a", pair[0], "b", pair[1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_greyscale_labels_of_every_depth_hold_train_ids(bits, suffix):
    label = np.arange(12 * 16).reshape(12, 16) % min(2**bits, 19)
    found = read_label(ROOT / f"tests/data/grey/{bits}.{suffix}", 19)
    assert (found == label).all() and found.flags.writeable


def test_classes_that_no_label_has_are_named(tmp_path, capsys):
    saved(tmp_path / "i.png", np.zeros((4, 8, 3), np.uint8))
    saved(tmp_path / "l.png", np.repeat([[0, 2, 2, 2, 2, 2, 255, 255]], 4, 0).astype(np.uint8))
    pixels = check_pairs(tmp_path, [("i.png", "l.png")], "my/list.txt", 4)
    assert pixels[0, :4].tolist() == [4, 0, 20, 0] and pixels[0, IGNORE] == 8
    said = capsys.readouterr().err
    assert "my/list.txt: no label has a pixel of class 1, 3 (255 means no label)" in said


@pytest.mark.parametrize("values, fits", [((0, 255), False), ((0, 1, 255), True), ((0,), True)])
def test_masks_of_0_and_255_are_refused_as_labels_of_two_classes(tmp_path, values, fits):
    saved(tmp_path / "i.png", np.zeros((4, 4, 3), np.uint8))
    label = np.zeros((4, 4), np.uint8)
    label[0, : len(values)] = values
    saved(tmp_path / "l.png", label)
    with (
        contextlib.nullcontext() if fits else pytest.raises(UserError, match="hold only 0 and 255")
    ):
        check_pairs(tmp_path, [("i.png", "l.png")], "list", 2)


def test_check_pairs(tmp_path):
    image = saved(tmp_path / "i.png", np.zeros((20, 40, 3), np.uint8))
    saved(tmp_path / "l.png", np.zeros((10, 20), np.uint8))
    rows = [("i.png", "l.png")]
    check_pairs(tmp_path, rows, "list", 19)
    with pytest.raises(UserError, match="one size"):
        check_pairs(tmp_path, rows, "list", 19, same_size=True)
    saved(tmp_path / "l.png", np.zeros((40, 20), np.uint8))
    with pytest.raises(UserError, match=r"l\.png: 20x40 .* 40x20"):
        check_pairs(tmp_path, rows, "list", 19)
    image.unlink()
    with pytest.raises(UserError, match=r"i\.png: no such file"):
        check_pairs(tmp_path, rows, "list", 19)


# --- runs


@pytest.mark.parametrize("name", ["banana", "0", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}: give auto, cpu, cuda or cuda:N"):
        select_device(name)


@pytest.mark.parametrize(
    "error, told",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "x.pth"),
            "x.pth: the disk is full; make",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x.pth"), "x.pth: the disk is full; make"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "the disk is full"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nGPU 0"), "CUDA out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "error: memory has run out (D",
        ),
        (MemoryError("Unable to allocate 3 TiB"), "; use --amp bf16. What is finished is kept"),
    ],
    ids=["full", "quota", "torch", "shm", "cuda", "cpu", "numpy"],
)
def test_limits_of_the_machine_are_told_in_a_line(error, told, capsys):
    def main():
        raise error

    assert run_main(main, "use --amp bf16") == 2
    said = capsys.readouterr().err
    assert told in said and said.startswith("error: ") and said.count("\n") == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_manifests_name_every_run_time_package():
    text = (ROOT / "requirements.txt").read_text()
    wanted = set(re.findall(r"^([\w-]+)", text, re.M))
    assert wanted <= set(PACKAGES) and len(wanted) > 10
    found = manifest({})
    assert all(found["versions"][name] for name in wanted)
    assert found["hardware"]["cpu"] and found["hardware"]["threads"] == 1


# --- progress


def test_a_log_gets_plain_lines_now_and_then(capsys, monkeypatch):
    clock = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in shown.progress(range(12), "PSA"):
        clock[0] += 10
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 5 and lines[0] == "PSA: 3/12 img, 10.00s/img, 01:30 left"


PROCESSES = """
import time, torch
from util import run
run.RENDEZVOUS_SECONDS = 3
with run.process_group(torch.device("cpu")) as (rank, world):
    time.sleep(4 * rank)  # slower than the rendezvous may take
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total.item() == world == 2
    store = torch.distributed.distributed_c10d._get_default_store()  # NCCL meets in it
    if rank == 0:
        store.wait(["late"])
    else:
        time.sleep(4)
        store.set("late", "")
"""


def test_the_docs_say_how_long_processes_wait():
    text = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
    assert "two minutes" in text and RENDEZVOUS_SECONDS == 2 * 60
    assert "up to a day" in text and WORK_SECONDS == 24 * 3600


def test_a_slow_process_is_waited_for(monkeypatch):
    monkeypatch.setattr(shown, "RENDEZVOUS_SECONDS", RENDEZVOUS_SECONDS)  # afterwards
    subprocess.run([warm_python(), "-c", ""], check=True)  # so that the second starts at once
    beside_a_second(monkeypatch, lambda: exec(PROCESSES, {}), "-c", PROCESSES)
