"""Class sets, palettes, label maps and lists: the one place where each is defined.

Label maps are 2-D uint8 arrays (height x width) of train IDs; IGNORE (255) means "no label". On
disk they are single-channel 8-bit PNGs, saved in palette mode so that a person can look at them.

Lists are text files with one image a line: `<image path> <label path>`, separated by one space,
both relative to a root path. Reading a list needs no image to exist; `check_files` looks for them.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage

from util.outputs import atomic_path, read_text, write_text
from util.run import UserError, process_rank, progress

IGNORE = 255
# Okabe and Ito's colours, which stay apart for colour-blind readers, of whatever is no class.
COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (110, 110, 110),
)


@dataclass(frozen=True)
class ClassSet:
    """K classes: names and RGB colours in the order of their train IDs, and which of them are stuff
    and things.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    stuff: tuple[int, ...]
    things: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.names)


# Cityscapes' 19 train IDs with its official colours; stuff and things as in the released SeCo code.
_CITYSCAPES = """\
road stuff 128,64,128
sidewalk stuff 244,35,232
building stuff 70,70,70
wall stuff 102,102,156
fence stuff 190,153,153
pole thing 153,153,153
traffic light thing 250,170,30
traffic sign thing 220,220,0
vegetation stuff 107,142,35
terrain stuff 152,251,152
sky stuff 70,130,180
person thing 220,20,60
rider thing 255,0,0
car thing 0,0,142
truck thing 0,0,70
bus thing 0,60,100
train thing 0,80,100
motorcycle thing 0,0,230
bicycle thing 119,11,32
""".splitlines()
# Their official label IDs (cityscapesscripts, helpers/labels.py).
LABEL_IDS_OF_19 = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# SYNTHIA's 16 classes: the 19 without terrain, truck and train, renumbered without gaps.
IDS_16_IN_19 = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
# mIoU* of the SYNTHIA papers: the 16 without wall, fence and pole.
IDS_13_IN_16 = (0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)


def generated_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` distinct colours by reversing the bits of the index over the three channels (as
    PASCAL VOC colours).
    """
    bits = np.arange(1, count + 1)[:, None] >> np.arange(9) & 1  # count x 9, the lowest first
    weights = 128 >> np.arange(3)
    return tuple(map(tuple, (bits.reshape(count, 3, 3) * weights[:, None]).sum(axis=1).tolist()))


def classes_of(lines: list[str], path: str | Path) -> ClassSet:
    """The class set of a file's lines: one class each in the order of the train IDs, its name,
    `stuff`, `thing` or `neither` and, if wanted, its colour: `traffic sign thing 220,220,0`. `#`
    begins a comment. path: for errors.
    """
    names, palette, ids = [], [], {"stuff": [], "thing": [], "neither": []}
    generated = generated_palette(len(lines))
    for number, line in enumerate(lines, start=1):
        where, words = f"{path}, line {number}", line.split("#")[0].split()
        if not words:
            continue
        colour = words.pop() if "," in words[-1] else None
        kind = words.pop().rstrip("s") if len(words) > 1 else ""
        if kind not in ids:
            raise UserError(
                f"{where}: give a name, `stuff` or `thing` and a colour: `sky stuff 70,130,180`"
            )
        if (name := " ".join(words)) in names:
            raise UserError(f"{where}: the class {name} has a line already")
        rgb = generated[len(names)]
        if colour:
            rgb = tuple(int(part) if part.isdecimal() else 256 for part in colour.split(","))
            if len(rgb) != 3 or max(rgb) > 255:
                raise UserError(f"{where}: {colour} is no colour; give red,green,blue, 0 to 255")
        ids[kind].append(len(names))
        names.append(name)
        palette.append(rgb)
    if not names:
        raise UserError(f"{path}: names no classes")
    return ClassSet(tuple(names), tuple(palette), tuple(ids["stuff"]), tuple(ids["thing"]))


CITYSCAPES_19 = classes_of(_CITYSCAPES, __file__)
SYNTHIA_16 = classes_of([_CITYSCAPES[i] for i in IDS_16_IN_19], __file__)


def read_classes(path: str | Path) -> ClassSet:
    return classes_of(read_text(path, "file of classes").splitlines(), path)


def class_set(
    class_num: int, stuff: list[int] | None = None, things: list[int] | None = None
) -> ClassSet:
    """The class set for `class_num` classes.

    19 and 16 are known. Any other number needs both `stuff` and `things`, disjoint lists of train
    IDs in 0 .. class_num - 1 which need not cover all.
    """
    known = {19: CITYSCAPES_19, 16: SYNTHIA_16}.get(class_num)
    if known and stuff is None and things is None:
        return known
    if stuff is None or things is None:
        raise UserError(
            f"--class-num {class_num}: give both --stuff and --things, or --classes FILE; without"
            " them only 16 and 19 classes are known"
        )
    stuff, things = tuple(sorted(set(stuff))), tuple(sorted(set(things)))
    for i in stuff + things:
        if not 0 <= i < class_num or (i in stuff and i in things):
            raise UserError(
                f"--stuff, --things: {i} is in both, or none of the train IDs 0 to {class_num - 1}"
                f" of --class-num {class_num}"
            )
    if known:
        return replace(known, stuff=stuff, things=things)
    names = tuple(f"class {i}" for i in range(class_num))
    return ClassSet(names, generated_palette(class_num), stuff, things)


def write_classes(folder: Path, classes: ClassSet) -> None:
    """classes.txt beside labels or a network, which `chosen_classes` finds."""
    lines = []
    for i, (name, colour) in enumerate(zip(classes.names, classes.palette)):
        kind = "stuff" if i in classes.stuff else "thing" if i in classes.things else "neither"
        lines.append(f"{name} {kind} {','.join(map(str, colour))}\n")
    write_text(folder / "classes.txt", "".join(lines))


def label_folder(root: Path, rows: list[tuple[str, str]]) -> Path:
    """The folder of the experiment whose labels a list names."""
    return root / rows[0][1].partition("/")[0]


def chosen_classes(options, beside: Path | None = None) -> ClassSet:
    """The class set that the options (util.options.ClassOptions) name, else that of classes.txt in
    the folder `beside`, else Cityscapes' 19. options.class_num is set to its number of classes.

    UserError if the options name another number of classes than classes.txt. Names and colours are
    its own where the options have none.
    """
    found = beside and (beside / "classes.txt")
    found = read_classes(found) if found and found.is_file() else None
    named = options.given.intersection(("class_num", "stuff", "things"))
    if options.classes:
        if named:
            option = f"--{sorted(named)[0].replace('_', '-')}"
            raise UserError(f"--classes {options.classes}: says all of the classes; drop {option}")
        classes = read_classes(options.classes)
    elif named or not found:
        classes = class_set(options.class_num, options.stuff, options.things)
        if found and found.count == classes.count:
            classes = replace(classes, names=found.names, palette=found.palette)
    else:
        classes = found
    if found and found.count != classes.count:
        raise UserError(
            f"{beside}: has labels of {found.count} classes (its classes.txt), but"
            f" {classes.count} are asked for; leave out the options of the classes"
        )
    options.class_num = classes.count
    return classes


# ------------------------------------------------------------------------------- label maps on disk


def read_image(path: str | Path) -> np.ndarray:
    """RGB image as uint8 H x W x 3, turned as its EXIF orientation says."""
    return np.asarray(read_picture(path))


def read_picture(path: str | Path) -> Image.Image:
    """RGB image, decoded and turned, as Pillow's: for what Pillow goes on with.

    16-bit grey is scaled to 8 bits by value / 257, so that 65535 is white.
    """
    with _reading(path, "image"), Image.open(path) as image:
        image.load()
        if image.mode.startswith("I;16") or image.mode == "I":
            values = np.asarray(image).clip(0, 65535)
            image = Image.fromarray((values / 257 + 0.5).astype(np.uint8))
        if image.mode == "F":
            raise UserError(f"{path}: an image of floating-point values; write 8 bits a channel")
        turned = ImageOps.exif_transpose(image)
        return turned if turned.mode == "RGB" else turned.convert("RGB")


def read_label(path: str | Path, class_num: int | None = None) -> np.ndarray:
    """Label map as a writable uint8 H x W array of train IDs and IGNORE.

    Greyscale of 1, 2 or 4 bits a pixel holds the train IDs themselves. With `class_num`, values
    other than 0 .. class_num - 1 and 255 are an error that names the file and the value. A lossy
    format and colours are refused.
    """
    with _reading(path, "label map"), Image.open(path) as image:
        if image.format in ("JPEG", "JPEG2000", "MPO"):
            raise UserError(
                f"{path}: a {image.format} changes the values of a label map; give a PNG of"
                " train IDs"
            )
        if image.mode not in ("L", "P", "1"):
            raise UserError(
                f"{path}: a label map has one 8-bit channel, this one is {image.mode} (a colour"
                " picture?); give the PNG of train IDs"
            )
        step = _grey_step(image)
        label = np.array(image, dtype=np.uint8) // step
    if class_num is not None:
        check_label_values(label, class_num, path)
    return label


def _grey_step(image: Image.Image) -> int:
    """What Pillow multiplies the stored values of an opened file by, to spread them over 0 .. 255:
    85 and 17 for greyscale of 2 and 4 bits a pixel, else 1.
    """
    stored = image.tile[0][3] if image.tile else ""  # as `L;4`; of TIFF the first of several values
    bits = re.match("L;([24])", stored if isinstance(stored, str) else str(stored[0]))
    return 255 // (2 ** int(bits[1]) - 1) if bits else 1


def check_label_values(label: np.ndarray, class_num: int, path: str | Path) -> None:
    present = pixels_of_values(label)
    present[IGNORE] = 0
    wrong = np.flatnonzero(present[class_num:]) + class_num
    if wrong.size:
        raise UserError(
            f"{path}: holds the value {wrong[0]}, but with {class_num} classes train IDs are 0 to"
            f" {class_num - 1} and 255 for no label; scripts/prepare_data.py makes train IDs of"
            " Cityscapes' label IDs"
        )


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as `read_image` gives it, from the file's header, without decoding it."""
    with _reading(path, "image"), Image.open(path) as image:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if sideways else (image.height, image.width)


@contextlib.contextmanager
def _reading(path: str | Path, what: str):
    """Turns whatever the image library raises in the block into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the list and --root-path") from None
    except Exception as error:  # the library's own kinds are many
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: the {what} cannot be read ({reason}); fetch or write it again"
        ) from None


def write_label(
    path: str | Path, label: np.ndarray, palette: tuple[tuple[int, int, int], ...]
) -> None:
    """Write a uint8 H x W label map as a palette PNG, atomically. IGNORE is shown black."""
    image = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8))
    channels = [channel for colour in palette for channel in colour]
    image.putpalette(channels + [0] * (768 - len(channels)))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


# ---------------------------------------------------------------------------------- connectivities


@dataclass(frozen=True)
class Connectivity:
    """An 8-connected component of one class in a label map.

    area: pixels. window: the slices (rows, columns) of its bounding box in the label map. mask:
    bool array of the window's shape, true on the component's pixels.
    """

    class_id: int
    area: int
    window: tuple[slice, slice]
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) in pixels."""
        rows, columns = self.window
        return columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start


def connectivities(label: np.ndarray, class_ids) -> Iterator[Connectivity]:
    """All connectivities of a label map (uint8 H x W): classes in the order given, within a class
    in raster order of the first pixel, as scipy numbers them.
    """
    boxes = ndimage.find_objects(label.astype(np.int32) + 1, max_label=256)  # of each class
    for class_id in class_ids:
        if boxes[class_id] is None:
            continue
        rows, columns = boxes[class_id]
        of_class = label[rows, columns] == class_id
        components, _ = ndimage.label(of_class, structure=np.ones((3, 3)))
        for number, (row, column) in enumerate(ndimage.find_objects(components), start=1):
            mask = components[row, column] == number
            window = (
                slice(row.start + rows.start, row.stop + rows.start),
                slice(column.start + columns.start, column.stop + columns.start),
            )
            yield Connectivity(int(class_id), int(np.count_nonzero(mask)), window, mask)


# -------------------------------------------------------------------------------------------- lists


def read_list(path: str | Path, columns: tuple[int, ...] = (2,)) -> list[tuple[str, ...]]:
    """Rows of a list file. columns: how many a row may have.

    Paths come back in their shortest form (`./a/../b.png` as `b.png`). Blank lines and Windows line
    ends are accepted. An error names the line of anything else that is odd: a path that is absolute
    or leaves the root, an image or a label that an earlier line has.
    """
    rows = []
    seen: dict[tuple[int, str], int] = {}
    for number, line in enumerate(read_text(path, "list file").splitlines(), start=1):
        where, names = f"{path}, line {number}", line.split()
        if not names:
            continue
        if len(names) not in columns:
            raise UserError(
                f"{where}: {len(names)} columns where {' or '.join(map(str, columns))} are wanted "
                "(`<image path> <label path>`, no spaces within a path)"
            )
        row = tuple(posixpath.normpath(name.replace("\\", "/")) for name in names)
        for column, name in enumerate(row):
            if name.startswith(("/", "../")) or name in (".", "..") or ":" in name.split("/")[0]:
                raise UserError(
                    f"{where}: {name} does not lie below --root-path; give a path relative to it"
                )
            first = seen.setdefault((column, name), number)
            if first != number:
                raise UserError(
                    f"{where}: {name} is in line {first} already; each image and each label may"
                    " occur once"
                )
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: the list is empty")
    return rows


def write_list(path: Path, rows: list[tuple[str, ...]]) -> None:
    write_text(path, "".join(" ".join(row) + "\n" for row in rows))


def check_files(root: str | Path, relative_paths: list[str], list_path: str | Path) -> None:
    """Fail before any work if a file of a list is missing; names the first, counts the rest."""
    missing = [p for p in relative_paths if not (Path(root) / p).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{Path(root) / missing[0]}: no such file{more}, named in {list_path}; "
            "check --root-path and the list"
        )


def check_one_each(files: dict[str, str | Path], what: str) -> None:
    """Fail if two images have one file. files: {image path: file}; what: their kind."""
    image_of: dict[str | Path, str] = {}
    for image, path in files.items():
        if image_of.setdefault(path, image) != image:
            raise UserError(
                f"{path}: would be the {what} of {image_of[path]} and of {image}; give each in a"
                " list of its own"
            )


def check_same_shape(
    path_a: Path,
    size_a: tuple[int, int],
    path_b: Path,
    size_b: tuple[int, int],
    same_size: bool = False,
) -> None:
    """Fail if two maps of one scene, of (height, width), differ in aspect ratio, or with
    `same_size` in size. Another resolution may have each side of the smaller map off by up to one
    pixel.
    """
    (small_h, small_w), (large_h, large_w) = sorted((size_a, size_b))
    turned = abs(small_w * large_h - large_w * small_h) > large_h + large_w
    if turned or (same_size and size_a != size_b):
        raise UserError(
            f"{path_a}: {size_a[1]}x{size_a[0]} pixels do not show the same as the"
            f" {size_b[1]}x{size_b[0]} of {path_b} (turned, cropped, scaled?); give both in one"
            f" {'size' if same_size else 'aspect ratio'}"
        )


def check_pairs(
    root: str | Path,
    rows: list[tuple[str, str]],
    list_path: str | Path,
    class_num: int,
    same_size: bool = False,
) -> np.ndarray:
    """Fail before any work if an image or label map of a list is missing, unreadable or unfit.

    Label maps are decoded and hold values of the class set only; each has its image's aspect ratio,
    or with `same_size` its size. Returns the pixels of each value in each label map, int64
    len(rows) x 256.
    """
    root = Path(root)
    check_files(root, [path for row in rows for path in row], list_path)

    def check(row: tuple[str, str]) -> np.ndarray:
        image, label = root / row[0], root / row[1]
        values = read_label(label, class_num)
        check_same_shape(label, values.shape, image, image_size(image), same_size)
        return pixels_of_values(values)

    with ThreadPoolExecutor() as pool:
        jobs = pool.map(check, rows)
        pixels = np.array(list(progress(jobs, "checking images and labels", len(rows))))
    check_classes(pixels.sum(axis=0), class_num, list_path)
    return pixels


def pixels_of_values(label: np.ndarray) -> np.ndarray:
    """int64 256: the pixels of each value in a label map."""
    return np.bincount(label.ravel(), minlength=256)


def check_classes(pixels: np.ndarray, class_num: int, list_path: str | Path) -> None:
    """Name the classes that occur in no label map of a list, in one line on stderr.

    pixels: int 256, of each value in all of them. Of two classes the second may not be absent where
    255 occurs: annotation programs write 255 for the object, which means "no label" here.
    """
    absent = np.flatnonzero(pixels[:class_num] == 0)
    if class_num == 2 and pixels[0] and pixels[IGNORE] and absent.size:
        raise UserError(
            f"{list_path}: its labels hold only 0 and 255, and 255 means no label; write 1 for the"
            " second class"
        )
    if absent.size and process_rank()[0] == 0:
        lacking = f"no label has a pixel of class {', '.join(map(str, absent))}"
        print(f"note: {list_path}: {lacking} (255 means no label)", file=sys.stderr)


def in_experiment(label_path: str, experiment: str) -> str:
    """The label path with another first folder: `HRDA/a/x.png` → `HRDA_vit_h/a/x.png`."""
    return f"{experiment}/{label_path.partition('/')[2]}"


def check_experiment(name: str, inputs: Iterable[str]) -> None:
    """Fail if --exp is no plain folder name, or the first folder of an input's path."""
    taken = {path.partition("/")[0] for path in inputs}
    if not name or "/" in name or name.startswith(".") or name in taken:
        raise UserError(f"--exp {name}: give a plain folder name that no input has")


class Experiment:
    """What is made of the labels of a list, and where it goes.

    rows: (image path, label path) of the list, below `root`; results: the same with the paths of
    the new labels; truth: {image path: ground-truth path} of --gt, or None; name: --exp, or that of
    the labels, which is their first folder, with `_<suffix>`; out: the folder of that name, for the
    results; list_path: of their list, `<name>/<list file name>` beside the list's folder if that is
    named as the labels' experiment, else in it.
    """

    def __init__(self, options, suffix: str, limit: int | None = None):
        """UserError for labels of several experiments, for a name that inputs have, and where --gt
        lacks an image.

        options: ListOptions and ClassOptions with exp and gt; limit: of the rows.
        """
        path, self.root, self.options = options.id_list_path, options.root_path, options
        self.rows = read_list(path)[:limit]
        experiments = {label.rpartition("/")[0].partition("/")[0] for _, label in self.rows}
        if len(experiments) > 1 or "" in experiments:
            raise UserError(
                f"{path}: the first folder of a label's path is its experiment; all need one, and"
                f" one list has one, not several experiments ({', '.join(sorted(experiments))})"
            )
        [old] = experiments
        self.name = name = f"{old}_{suffix}" if options.exp is None else options.exp
        check_experiment(name, [path for row in self.rows for path in row])
        self.out = self.root / name
        self.classes = chosen_classes(options, self.root / old)
        self.truth = dict(read_list(options.gt)) if options.gt else None
        for image, _ in self.rows:
            if options.gt and image not in self.truth:
                raise UserError(
                    f"{options.gt}: names no ground truth for {image}; --gt needs every image of"
                    f" {path}"
                )
        self.results = [(image, in_experiment(label, name)) for image, label in self.rows]
        beside = path.parent.parent if path.parent.name == old else path.parent
        self.list_path = beside / name / path.name
