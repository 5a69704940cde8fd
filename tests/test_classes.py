"""The class set of a file (--classes), and that of the labels that a command reads."""

from dataclasses import replace

import pytest
from conftest import ROOT

from util.labels import chosen_classes, read_classes, write_classes
from util.options import ClassOptions, parse_options
from util.run import UserError

FIVE = """sky stuff 70,130,180
# what moves
traffic sign things  # with a colour of its own

car thing 0,0,142
"""


@pytest.fixture
def five(tmp_path):
    (tmp_path / "five.txt").write_text(FIVE)
    return tmp_path / "five.txt"


def chosen(*words, beside=None):
    options = parse_options(ClassOptions, "", [str(word) for word in words])
    classes = chosen_classes(options, beside)
    assert options.class_num == classes.count
    return classes


def test_a_file_of_classes(five):
    classes = read_classes(five)
    assert classes.names == ("sky", "traffic sign", "car")
    assert classes.stuff == (0,) and classes.things == (1, 2)
    assert classes.palette[0] == (70, 130, 180) and classes.palette[2] == (0, 0, 142)
    assert len(set(classes.palette)) == 3
    assert chosen("--classes", five) == classes
    classes = replace(classes, things=(1,))
    write_classes(five.parent, classes)
    assert read_classes(five.parent / "classes.txt") == classes


def test_camvids_classes_are_a_file():
    classes = read_classes(ROOT / "splits/camvid/classes.txt")
    assert classes.count == 11 and classes.names[3] == "road"
    assert classes.stuff == (0, 1, 3, 4, 5, 7)


@pytest.mark.parametrize(
    "text, told",
    [
        ("sky\n", "line 1: give a name, `stuff` or `thing`"),
        ("sky stuff\ncar 1,2,3\n", "line 2: give a name"),
        ("stuff\n", "line 1: give a name"),
        ("sky stuff\nsky thing\n", "line 2: the class sky has a line already"),
        ("sky stuff 1,2\n", "1,2 is no colour"),
        ("sky stuff 1,2,300\n", "1,2,300 is no colour"),
        ("sky stuff a,b,c\n", "a,b,c is no colour"),
        ("# nothing\n", "names no classes"),
        (None, "no such file of classes"),
    ],
)
def test_a_bad_file_of_classes_is_told(tmp_path, text, told):
    if text is not None:
        (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError, match=told):
        read_classes(tmp_path / "c.txt")


def test_what_stands_beside_the_labels_is_used_and_compared(five, tmp_path):
    folder = tmp_path / "labels"
    assert chosen(beside=folder).count == 19
    write_classes(folder, read_classes(five))
    assert chosen(beside=folder) == read_classes(five)
    named = chosen("--class-num", 3, "--stuff", 1, "--things", 0, 2, beside=folder)
    assert named.names == ("sky", "traffic sign", "car") and named.stuff == (1,)
    for words in (("--class-num", 19), ("--classes", ROOT / "splits/camvid/classes.txt")):
        with pytest.raises(UserError, match=f"{folder}: has labels of 3 classes"):
            chosen(*words, beside=folder)


def test_classes_are_said_once(five):
    with pytest.raises(UserError, match="says all of the classes; drop --class-num"):
        chosen("--classes", five, "--class-num", 3)
