"""Class names of public data sets, in the order of their labels without the void one."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", " ").strip(" ,").split(","))


ADE20K = _names("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
""")

VOC = _names("""
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
person, pottedplant, sheep, sofa, train, tvmonitor
""")

# Without the background.
CONTEXT = _names("""
aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat, ceiling,
chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse, keyboard, light,
motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky, snow,
sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
""")

CITYSCAPES = _names("""
road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, rider, car,
truck, bus, train, motorcycle, bicycle
""")

CAMVID = _names("sky, building, pole, road, pavement, tree, sign_symbol, fence, car, pedestrian, bicyclist")

# 80 things, then 91 kinds of stuff.
COCO_STUFF = _names("""
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush,
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
window-blind, window-other, wood
""")

# The groups of COCO-Stuff's hierarchy with their members; those of stuff end in "-stuff".
COCO_STUFF_27 = {
    "electronic": _names("tv, laptop, mouse, remote, keyboard, cell phone"),
    "appliance": _names("microwave, oven, toaster, sink, refrigerator"),
    "food": _names("banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake"),
    "furniture": _names("chair, couch, potted plant, bed, dining table, toilet"),
    "indoor": _names("book, clock, vase, scissors, teddy bear, hair drier, toothbrush"),
    "kitchen": _names("bottle, wine glass, cup, fork, knife, spoon, bowl"),
    "accessory": _names("backpack, umbrella, handbag, tie, suitcase"),
    "animal": _names("bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe"),
    "outdoor": _names("traffic light, fire hydrant, stop sign, parking meter, bench"),
    "person": ("person",),
    "sports": _names(
        "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
        "tennis racket"
    ),
    "vehicle": _names("bicycle, car, motorcycle, airplane, bus, train, truck, boat"),
    "ceiling-stuff": _names("ceiling-other, ceiling-tile"),
    "floor-stuff": _names("carpet, floor-marble, floor-other, floor-stone, floor-tile, floor-wood"),
    "food-stuff": _names("food-other, fruit, salad, vegetable"),
    "furniture-stuff": _names(
        "cabinet, counter, cupboard, desk-stuff, door-stuff, furniture-other, light, mirror-stuff, shelf, stairs, table"
    ),
    "raw-material-stuff": _names("cardboard, metal, paper, plastic"),
    "textile-stuff": _names("banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, textile-other, towel"),
    "wall-stuff": _names("wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood"),
    "window-stuff": _names("window-blind, window-other"),
    "building-stuff": _names("bridge, building-other, house, roof, skyscraper, tent"),
    "ground-stuff": _names(
        "dirt, gravel, ground-other, mud, pavement, platform, playingfield, railroad, road, sand, snow"
    ),
    "plant-stuff": _names("branch, bush, flower, grass, leaves, moss, plant-other, straw, tree"),
    "sky-stuff": _names("clouds, sky-other"),
    "solid-stuff": _names("hill, mountain, rock, solid-other, stone, wood"),
    "structural-stuff": _names("cage, fence, net, railing, structural-other"),
    "water-stuff": _names("fog, river, sea, water-other, waterdrops"),
}
