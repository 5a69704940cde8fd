"""The embedded benchmark: procedural street scenes with the 19 Cityscapes classes, in a source and
a target style.

    # images, ground truth and lists under data/toy/s0/
    python -m dataset.toy --seed 0
    python -m dataset.toy --preview images/toy.png      a picture of some scenes of every style

Source scenes are clean and colourful, as a game's, under skies of all weathers. Target scenes are
those of a hazy, faded day: they differ in illumination, colour cast, saturation, palette, texture,
haze, blur, noise, cast shadows, and in how many of which things stand where. A third style,
"random", varies all of this far more widely; only the tiny SAM is trained on it
(scripts/dev/sam_tiny.py). A model trained on the source alone loses a good third of its mIoU
on the target, with speckles and confused regions.

The target's ground truth is written for eval.py and for diagnostics: `target_train.txt`, which
everything before evaluation reads, has images only.

Same bytes everywhere: all random numbers come from numpy's PCG64; shapes are filled by Pillow at
integer coordinates at twice the size; noise is random bytes enlarged by Pillow's fixed-point
resampling; what follows is float32 arithmetic of single operations (+, -, x, comparisons), whose
results IEEE 754 fixes, and rounding. No sine, no matrix product.

Needs when copied away: dataset/toy/, util/{labels,options,outputs,pictures,run}.py.
"""

from dataset.toy.data_set import FIRST_FREE_SEED, SPLITS, make_toy, scene_seed
from dataset.toy.objects import STYLES
from dataset.toy.street import Scene, draw_scene

__all__ = ("FIRST_FREE_SEED", "SPLITS", "STYLES", "Scene", "draw_scene", "make_toy", "scene_seed")
