"""Fixtures that the original code made: the weights and the picture that they are made from.

tests/data/ holds what the authors' own networks gave for weights and an image that are computed,
not trained, so that a few kilobytes of output stand for a network of any size. The formula hashes
an element's index and its tensor's name (murmur3's finaliser), which is the same everywhere.
"""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent / "data"


def hashed(name: str, count: int) -> np.ndarray:
    """uint32, `count`: the hash of 0 .. count - 1, salted by `name`."""
    with np.errstate(over="ignore"):
        h = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
        h += np.uint32(zlib.crc32(name.encode("ascii")))
        h ^= h >> 16
        h *= np.uint32(0x85EBCA6B)
        h ^= h >> 13
        h *= np.uint32(0xC2B2AE35)
        h ^= h >> 16
    return h


def formula_tensor(key: str, shape) -> torch.Tensor:
    """The weight of a state dict's `key` (with or without a leading `module.`), float32; int64 0
    for num_batches_tracked.
    """
    name, count = key.removeprefix("module."), int(np.prod(shape, dtype=np.int64))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    u = hashed(name, count) / 2.0**32
    if name.endswith("running_var"):
        u += 0.5
    elif name.endswith(("running_mean", "bias")):
        u *= 0.2
        u -= 0.1
    elif len(shape) == 1:
        u += 0.5
        if "bn3" in name:
            u *= 0.25
    else:
        u *= 2
        u -= 1
        u *= np.sqrt(6 / np.prod(shape[1:], dtype=np.int64))
    return torch.from_numpy(u.astype(np.float32).reshape(shape))


def formula_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {key: formula_tensor(key, shape) for key, shape in shapes.items()}


def formula_image(height: int, width: int) -> np.ndarray:
    """uint8 H x W x 3, RGB: blocks of 8 x 8 pixels in one colour."""
    shape = -(-height // 8), -(-width // 8), 3
    blocks = (hashed("image", int(np.prod(shape))) >> 24).astype(np.uint8).reshape(shape)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def read_keys(name: str) -> dict:
    """tests/data/keys_<name>.json.gz: key -> shape of a state dict."""
    return json.loads(gzip.decompress((DATA / f"keys_{name}.json.gz").read_bytes()))


def read_arrays(name: str) -> dict[str, np.ndarray]:
    """tests/data/<name>.npz."""
    with np.load(DATA / f"{name}.npz") as content:
        return {key: content[key] for key in content.files}


def original_checkpoint(name):
    """A file's content as the original code saves it, with the formula's weights; (content, number
    of classes).
    """
    kind, _, detail = name.partition("_")
    shapes = read_keys("dtst" if kind == "dtst" else name)
    if kind == "dtst":
        for key, shape in shapes["classifier"].items():
            shapes["classifier"][key] = [int(detail), *shape[1:]]
        parts = {part: formula_state(table) for part, table in shapes.items()}
        return {"iteration": 20000, **parts}, int(detail)
    state = formula_state(shapes)
    if kind == "cma":
        return state, 19
    if kind == "shade":
        return {"state_dict": state, "epoch": 3, "mean_iu": np.float64(0.4), "command": "x"}, 19
    class_num = shapes["layer5.head.1.weight"][0]
    part = {"model_state": state, "objective_vectors": torch.zeros(class_num, 256)}
    return {"ResNet101": part, "iter": 1, "best_iou": np.float64(0.5)}, class_num
