"""The parts that a pixel of a scene may show. A label is an index into `PARTS`."""

BACKGROUNDS = ("sky", "ground", "water", "foliage")
OBJECT_PARTS = ("body", "head", "limb", "tail", "crest", "wing", "muzzle", "eye")
PARTS = BACKGROUNDS + OBJECT_PARTS
SKY, GROUND, WATER, FOLIAGE, BODY, HEAD, LIMB, TAIL, CREST, WING, MUZZLE, EYE = range(len(PARTS))
