"""The 20 classes of shapes20: a shape with a surface and a loose palette, under an invented WordNet tree.

The wnids are invented: they lie beyond every real one (n9xxxxxxx) and mean nothing outside this data set.
"""

from typing import NamedTuple


class ShapeClass(NamedTuple):
    """One leaf of the tree. ``hue`` is the palette's centre in degrees; a picture strays by up to HUE_SPREAD."""

    ilsvrc_id: int
    wnid: str
    words: str
    shape: str
    surface: str
    hue: float
    gloss: str


class Ancestor(NamedTuple):
    """One inner node of the tree; ``children`` are ILSVRC IDs, ``height`` is the longest way down to a leaf."""

    ilsvrc_id: int
    wnid: str
    words: str
    gloss: str
    children: tuple[int, ...]
    height: int


HUE_SPREAD = 16.0

# Neighbours in this table are look-alikes: the same surface and nearly the same hue, or the same shape.
_LEAVES = [
    ShapeClass(1, "n93318457", "striped circle, striped ball", "circle", "stripes", 0, "a disc with parallel stripes"),
    ShapeClass(2, "n90714226", "striped ring, hoop", "ring", "stripes", 24, "a hoop with parallel stripes"),
    ShapeClass(3, "n97120538", "dotted heart", "heart", "dots", 352, "a heart with round dots"),
    ShapeClass(4, "n91806913", "dotted egg, Easter egg", "egg", "dots", 322, "an egg with round dots"),
    ShapeClass(5, "n98245071", "checked square, checkerboard", "square", "checks", 208, "a square of small squares"),
    ShapeClass(6, "n92450386", "checked diamond", "diamond", "checks", 234, "a tall rhombus of small squares"),
    ShapeClass(7, "n95037742", "plain star", "star", "plain", 56, "a star of one colour with five points"),
    ShapeClass(8, "n90382915", "plain crescent, moon", "crescent", "plain", 36, "a sickle of one colour"),
    ShapeClass(9, "n96571208", "zigzag triangle", "triangle", "zigzag", 152, "a triangle with zigzag lines"),
    ShapeClass(10, "n94069831", "zigzag leaf", "leaf", "zigzag", 114, "a pointed leaf with zigzag lines"),
    ShapeClass(11, "n92917664", "brick house", "house", "bricks", 6, "a gabled front laid in bricks"),
    ShapeClass(12, "n98803159", "brick arch, archway", "arch", "bricks", 26, "a gateway laid in bricks"),
    ShapeClass(13, "n91245590", "ringed circle, target, bull's-eye", "circle", "rings", 262, "a disc of nested rings"),
    ShapeClass(14, "n97664312", "ringed flower", "flower", "rings", 290, "six petals crossed by nested rings"),
    ShapeClass(15, "n95590127", "wavy drop, raindrop", "drop", "waves", 208, "a drop with wavy lines"),
    ShapeClass(16, "n93902748", "wavy fish", "fish", "waves", 180, "a fish with wavy lines"),
    ShapeClass(17, "n99104473", "scaly fish", "fish", "scales", 166, "a fish with overlapping scales"),
    ShapeClass(18, "n94736205", "plaid cross", "cross", "plaid", 92, "a cross with crossing bands"),
    ShapeClass(19, "n96083391", "plaid hexagon", "hexagon", "plaid", 66, "a hexagon with crossing bands"),
    ShapeClass(20, "n91573084", "faded egg", "egg", "faded", 305, "an egg that fades from one colour to another"),
]

ANCESTORS = [
    Ancestor(21, "n90100021", "striped thing", "a thing with stripes", (1, 2), 1),
    Ancestor(22, "n90100022", "dotted thing", "a thing with dots", (3, 4), 1),
    Ancestor(23, "n90100023", "checked thing", "a thing with checks", (5, 6), 1),
    Ancestor(24, "n90100024", "plain thing", "a thing of one colour", (7, 8), 1),
    Ancestor(25, "n90100025", "zigzag thing", "a thing with zigzag lines", (9, 10), 1),
    Ancestor(26, "n90100026", "building", "a thing laid in bricks", (11, 12), 1),
    Ancestor(27, "n90100027", "ringed thing", "a thing with nested rings", (13, 14), 1),
    Ancestor(28, "n90100028", "wavy thing", "a thing with wavy lines", (15, 16), 1),
    Ancestor(29, "n90100029", "fish", "a thing with a tail and fins", (16, 17), 1),
    Ancestor(30, "n90100030", "plaid thing", "a thing with crossing bands", (18, 19), 1),
    Ancestor(31, "n90100031", "round thing", "a thing without corners", (1, 2, 4, 13, 20), 1),
    Ancestor(32, "n90100032", "thing, object", "whatever can be drawn", tuple(range(21, 32)), 2),
]

# As everywhere in ImageNet, the class index is the rank of the wnid, from 0; it is not the ILSVRC ID.
CLASSES = sorted(_LEAVES, key=lambda leaf: leaf.wnid)
