"""Malformed command lines and configurations by seeded mutation of ones that work in the folder of a trial.

The folder has `photos` (three pictures), `data` (a data set for segmentation), `good.safetensors` (weights of toy-vit),
`earlier` and `data.json` (results of earlier commands) and `out` (an earlier training).
"""

import shlex
from random import Random
from typing import NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


COMMANDS = """
upsample photos/0.png photos/1.png --checkpoint tile-2x --backbone toy-vit -o new --size 64x80
upsample photos --checkpoint tile-2x --backbone toy-vit -o new --output-size 20x30 --max-memory 200MiB --device cpu
upsample photos/0.png --checkpoint good.safetensors -o new
fit photos/0.png --backbone toy-vit -o new --steps 2 --views 3 --dim 8 --render 2 --size 32x40 --query 16x20 --seed 1
export good.safetensors -o new.safetensors --backbone toy-vit
pack photos new --images-per-shard 2
eval zoom --data photos --upsampler tile-2x --backbone toy-vit --limit 2 --json new.json --dtype float32
eval fidelity --data photos --upsampler a=bilinear-2x --backbone toy-vit --limit 1 --json new.json
eval cka --data photos --upsampler bilinear-2x --backbone toy-vit --limit 2 --json new.json
eval segmentation --data data --upsampler bilinear-2x --backbone toy-vit --steps 2 --batch 2 --json new.json
eval segmentation --data data --upsampler bilinear-2x --backbone toy-vit --steps 2 --limit 2 --low-res-size 32x40
eval segmentation --data data --upsampler tile-2x --backbone toy-vit --steps 2 --label-size 16x20 --learning-rate 0.1
eval segmentation --data data --upsampler tile-2x --backbone toy-vit --steps 2 --classes 4 --cache-limit 1GiB --seed 0
eval throughput --backbone toy-vit --factors 2 --upsamplers bilinear --json new.json --repeat 2
eval flops --backbone toy-vit --factors 2 --upsamplers bilinear tile --json new.json
figure pca photos/0.png --upsampler bilinear-2x --backbone toy-vit -o new.png
figure similarity photos/0.png --upsampler bilinear-2x --backbone toy-vit --at 0.4,0.6 -o new.png
figure miou data.json -o new.png
doctor --backbone toy-vit --repeat 2
ls upsamplers --markdown
""".strip().splitlines()
# Flags whose value is work that was asked for: no huge numbers.
WORK = ("--steps", "--views", "--repeat", "--factors")
WORDS = [
    *_words("""
    nan inf -inf -1 0 1 2.5 1e309 -0 1_0 +3 0x10 ² ١٢ ½ é 日本 1x1 0x0 8x8 64x x64 1x2x3 -8x8 9x100000 ²x² 65x81 -- - =
    =x x= -o --json -x --nothing --size -vvvv -q --help .. . photos data data.json earlier photos/0.png good.safetensors
    earlier/0.safetensors missing.pth /dev/null /dev/full /dev/zero /dev/stdin /proc/self/mem ~ ~nobody/x
    $HOME * {0..9} { %s%n {0} true null [] {} 1,2 0.5,0.5 2,nan os:getcwd x:y : a: tile tile-0x tile--1x tile-nanx
    tile-1.5x bilinear-1x bilinear-1e9x featsharp-2x tile-x toy-vit toy-cnn toy-vit? toy-vit?layer=9 toy-vit?x=1& toy
    vits14-focus/featsharp-2x cuda:99 meta cpu:3 mps float16 float8 1B 1KiB 10MiB 99999999TiB -1GiB GiB out/last.pth
    """),
    *("", " ", "\n", "a\0b", "\0", "\udcff", "a" * 5000, "a/" * 3000),
]
HUGE = [
    *_words("""
99999999x1 1x99999999 99999x99999 99999999999999999999 1000000000 2147483648 1e18 4096 tile-99999x bilinear-99999999x
photos{0..999999999} data{0..999999999}.tar
"""),
    "1" * 5000,
]


def _sort(word: str) -> str:
    """Numbers, sizes, or others: a value is mostly changed to one that looks like it."""
    return "number" if word[:1].isdigit() and "x" not in word else "size" if word[:1].isdigit() else "other"


class Words(NamedTuple):
    """The arguments of a command, and what was changed."""

    arguments: list[str]
    change: str


def command(draw: Random) -> Words:
    """A command with one to three words replaced, removed, repeated, moved or added."""
    words = shlex.split(draw.choice(COMMANDS))
    changes = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        at = draw.randrange(1, len(words))
        how = draw.choice((*["value"] * 12, "remove", "repeat", "move", "add"))
        values = [n for n in range(1, len(words)) if words[n - 1].startswith("-") and not words[n].startswith("-")]
        if how == "value" and values:
            at = draw.choice(values)
            huge = [] if words[at - 1] in WORK else HUGE
            pool = [word for word in WORDS + huge if _sort(word) == _sort(words[at])]
            if draw.random() < 0.7:  # a number that a parser takes, so that it reaches the code
                pool = [word for word in pool if _sort(word) != "number" or word.isdecimal()]
            words[at] = draw.choice(pool if draw.random() < 0.9 else WORDS + huge)
        elif how == "remove" and len(words) > 2:
            del words[at]
        elif how == "repeat":
            words[at:at] = words[at : at + draw.choice((1, 2))]
        elif how == "move":
            words.insert(draw.randrange(1, len(words)), words.pop(at))
        else:
            words.insert(at + 1, draw.choice(WORDS))
        changes.append(how)
    return Words(words, ", ".join(changes))


CONFIGURATION = _words("""
+model=toy-vit +upsampler=featsharp-linear-2x train_data_dir=photos batch_size=1 num_workers=0 num_training_steps=1
normalizer.num_samples=4 normalizer.batch_size=4 viz.type=none progress=false viz.num_images=1 log_frequency=0
linear_fit.samples=2 output_root=out
""")
# Work or memory that was asked for is composed and printed, not done.
SIZES = _words("""
num_training_steps batch_size accumulation_steps num_workers normalizer.num_samples normalizer.batch_size
views.num_views linear_fit.samples feature_cache.samples viz.num_images compile_model
""")
KEYS = _words("""
train_data_dir val_data_dir dist_train_data_dir output_base output_subdir seed device distributed_timeout
compile_backend resume force_resume dry_run bias_buffer spectral log_frequency val_frequency checkpoint_frequency
model.name model.dtype upsampler.name upsampler.factor upsampler.dtype upsampler.options upsampler.options.x
upsampler.options.kernel_size upsampler.options.num_blocks data.min_size data.filter data.shuffle_buffer normalizer
normalizer.name normalizer.cache views.zoom views.jitter_zoom views.perspective views.rotation views.shift views.flip
objective objective.name objective.downsampler objective.kernel_size objective.uncertainty optim.learning_rate
optim.warmup_steps optim.clip_norm optim.spectral_scale linear_fit.ridge feature_cache.folder viz.type viz.mode
datasets upsampler model views optim hydra.run.dir x defaults
""")
PLAIN = _words(
    "0 1 2 3 -1 0.5 1.0 1e-30 1e30 1e300 nan inf true false null [0,1] [1,1] [1,1.5] toy-cnn tile featup none"
)
SETTINGS = [
    *_words(r"""
    nan inf -inf -1 0 1 2 3.5 1e309 1e-300 99999999999999999999 true null '' x é '²' ² [] [1] [1,2] [2,1] [nan,nan]
    [0,1e300] [1,2,3] {} {a:1} {a:{b:{c:1}}} ${seed} ${x} ${output_root} ${output_root}${output_root} ${oc.env:HOME}
    ${oc.env:NOTHING} ${ ${seed:1} ${..} ${.name} 1,2 range(1,3) choice(1,2) glob(*) int(x) a=b " ' \ ??? _ @ a@b photos
    photos/0.png missing . .. /dev/null /dev/full /dev/zero 'photos/{0..999999999}.tar' [[photos,0]] [[photos,nan]]
    [[photos,1],photos] [[[[photos]]]] [photos,missing] [null] toy-cnn 'toy-vit?layer=9' bilinear tile featup jafar
    os:getcwd os:no_function float16 bfloat16 cpu meta cuda:99 attention simple reconstruction phi-s none tensorboard
    [none,x] 'a${seed}' ${oc.decode:'[1,2'} ${oc.decode:"{a:1}"} ${oc.dict.keys:model} ${oc.create:{a:1}}
    """),
    *("'a b'", "'\0'", "'\udcff'", "x" * 3000, "a/" * 3000, "[" * 300 + "]" * 300, "{a:" * 200 + "1" + "}" * 200),
    "${oc.decode:'{a: &a [x,x], b: &b [*a,*a], c: [*b,*b]}'}",
    "${oc.decode:'" + "[" * 5000 + "'}",
    "{" + ",".join(f"k{number}:{number}" for number in range(2000)) + "}",
]


def configuration(draw: Random) -> Words:
    """Overrides of a training with one to three keys set to other values, removed or given twice."""
    given = [*CONFIGURATION[:-1], draw.choice(("output_root=out", "output_root=new"))]
    changes = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        key, value = draw.choice(KEYS + SIZES), draw.choice(SETTINGS if draw.random() < 0.6 else PLAIN)
        if draw.random() < 0.1:
            at = draw.randrange(len(given))
            given[at] = draw.choice((given[at] + value, given[at][:-2], value + given[at], key))
            given.append("dry_run=true")
        else:
            given = [one for one in given if one.partition("=")[0].lstrip("+") != key]
            sign = draw.choice(("", "", "", "", "", "", "+", "++", "~"))
            given.append(f"{sign}{key}={value}")
            if key in SIZES:
                given.append("dry_run=true")
        changes.append(key)
    return Words(["train", *dict.fromkeys(given)], ", ".join(changes))
