"""How many training pictures a second does one core make, and does a training step wait for them?

    python benchmarks/input.py [--pictures=64] [--rounds=8] [--step=0.25] [--batches=16]

Speed: JPEG to 256 px by decoding, RandomResizedCrop(0.2, 1) and mirroring, with and without
RandAugment, in one thread. The pictures, 500x375 at quality 85 as COCO's are about, are made here,
in a temporary folder: fields of noise whose spectrum falls as a photo's does, objects of other
textures that hide one another, and a sensor's grain. Other programs may share the machine, so three
rates are printed: over each picture's least processor time of all rounds, over the mean processor
time, and over the wall clock. The ways take turns picture by picture; ratios are of the first rate.

Waiting: batches of 64 by the iterator of training (RandAugment, captions tokenised, --threads
threads or --workers processes), against a step that sleeps for --step seconds, as one on an
accelerator leaves the processor alone. The first batch, before which everything has to start, is
not counted. Beside it stands the processor time that a batch takes, without workers.

Feeding: pictures a second that an H100 trains on is its 989 TFLOP/s in bf16, at 40 % utilisation,
over the FLOPs a picture of configs/pretrain_base.py (all objectives and the teacher, counted by
mplug_jax.training.flops); the cores are that over the rates with RandAugment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from configs import pretrain_base
from mplug_jax.data.examples import PretrainExamples
from mplug_jax.data.pipeline import train_iterator
from mplug_jax.data.randaugment import rand_augment
from mplug_jax.data.sources import build_source
from mplug_jax.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from mplug_jax.data.transforms import RATIO, ImageTransform, crop_box
from mplug_jax.tasks import build_task
from mplug_jax.training.flops import matmul_flops
from mplug_jax.training.sharding import abstract_batch, make_mesh

SIDE, SCALE = 256, (0.2, 1.0)
WIDTH, HEIGHT, QUALITY = 500, 375, 85
BATCH = 64
PEAK, UTILISATION = 989e12, 0.4  # of an H100, bf16 without sparsity
TARGET, MOST_WAIT = 900, 0.02
EXACT, FAST = "mplug_jax, decoder='pillow'", "mplug_jax, decoder='fast'"

_PICTURES = flags.DEFINE_integer("pictures", 64, "Pictures made.", lower_bound=8)
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Times that each picture is loaded.", lower_bound=1)
_STEP = flags.DEFINE_float("step", 0.25, "Seconds that the pretended step sleeps.")
_BATCHES = flags.DEFINE_integer("batches", 16, "Batches waited for.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 0, "data.workers of the iterator.")
_THREADS = flags.DEFINE_integer("threads", 2, "data.threads of the iterator.")

# Of a file's path and a generator, the pixels uint8 [256, 256, 3].
Way = Callable[[str, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rate:
    """Pictures a second: of the least and the mean processor time, and of the wall clock."""

    processor: float
    mean: float
    wall: float


def photo(rng: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [height, width, 3]: no photo, but as hard to compress and to resample as one."""
    across = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    across = np.maximum(across, 1 / max(height, width))

    def field(slope: float) -> np.ndarray:
        waves = rng.normal(size=across.shape) + 1j * rng.normal(size=across.shape)
        values = np.fft.irfft2(waves / across**slope, s=(height, width))
        return (values - values.mean()) / values.std()

    light = 35 * field(1.3)
    scene = np.stack([light + 10 * field(1.6) for _ in range(3)], -1) + rng.uniform(80, 160, 3)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        tall, wide = rng.uniform(20, 120, 2)
        inside = ((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 < 1
        texture = rng.uniform(30, 220, 3) + rng.uniform(5, 30) * field(1.2)[..., None]
        scene[inside] = texture[inside]
    return (scene + 2 * rng.normal(size=scene.shape)).clip(0, 255).astype(np.uint8)


def make_photos(folder: Path, count: int) -> list[str]:
    """Paths of JPEGs, with `train.jsonl` beside them that captions each."""
    rng = np.random.default_rng(0)
    names = [f"{number}.jpg" for number in range(count)]
    for name in names:
        Image.fromarray(photo(rng)).save(folder / name, quality=QUALITY)
    rows = [{"image": name, "captions": [f"a picture called {name}"]} for name in names]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(folder / name) for name in names]


def pillow_alone(augment: bool, path: str, rng: np.random.Generator) -> np.ndarray:
    """The pipeline as one writes it with Pillow, and nothing of ours but what is drawn."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    left, top, width, height = crop_box(*picture.size, rng, SCALE, RATIO)
    picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(rand_augment(picture, rng) if augment else picture)


def torchvision_way(augment: bool) -> Way | None:
    """torchvision's transforms on Pillow pictures; None where it is not installed."""
    try:
        torch = importlib.import_module("torch")
        transforms = importlib.import_module("torchvision.transforms")
    except ImportError:
        return None
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(SIDE, SCALE, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        *([transforms.RandAugment(2, 7)] if augment else []),
    ]
    chain = transforms.Compose(steps)

    def load(path: str, rng: np.random.Generator) -> np.ndarray:
        # Draws of its own would differ by round, and the least time be that of the smallest crop.
        # torch.manual_seed takes far longer, and its time would count: it sees to GPUs, too.
        torch.default_generator.manual_seed(int(rng.integers(2**31)))
        return np.asarray(chain(Image.open(path).convert("RGB")))

    return load


def ways(augment: bool) -> dict[str, Way]:
    """What is compared, by name; torchvision where it is installed."""
    ours = functools.partial(
        ImageTransform, (SIDE, SIDE), train=True, crop_scale=SCALE, randaugment=augment
    )
    found: dict[str, Way | None] = {
        EXACT: ours(decoder="pillow"),
        FAST: ours(decoder="fast"),
        "Pillow alone": functools.partial(pillow_alone, augment),
        "torchvision": torchvision_way(augment),
    }
    return {name: way for name, way in found.items() if way is not None}


def measure(compared: dict[str, Way], paths: list[str]) -> dict[str, Rate]:
    """Rates over all pictures; every round repeats the crops of the first."""
    # Seconds of processor and wall: [round, picture, 2].
    spent = {name: np.zeros((_ROUNDS.value, len(paths), 2)) for name in compared}
    for turn in range(_ROUNDS.value):
        for number, path in enumerate(paths):
            for name, way in compared.items():
                rng = np.random.default_rng(number)
                began = np.array([time.process_time(), time.perf_counter()])
                way(path, rng)
                spent[name][turn, number] = [time.process_time(), time.perf_counter()] - began
    return {
        name: Rate(1 / seconds.min(0)[:, 0].mean(), *(1 / seconds.mean((0, 1))))
        for name, seconds in spent.items()
    }


def waiting(folder: Path, decoder: str) -> tuple[float, float]:
    """The share of the time that a loop of sleeping steps waits, and a batch's processor time."""
    source = build_source({"kind": "jsonl", "path": "train.jsonl"}, folder)
    model = folder / "tokenizer.model"
    if not model.exists():
        train_sentencepiece((source[i]["captions"][0] for i in range(len(source))), model, 100)
    transform = ImageTransform((SIDE, SIDE), train=True, crop_scale=SCALE, decoder=decoder)
    make_example = PretrainExamples(SentencePieceTokenizer(model), transform, 30, 30)
    batches = train_iterator(
        [(source, 1.0)],
        make_example,
        seed=0,
        batch_size=BATCH,
        workers=_WORKERS.value,
        threads=_THREADS.value,
    )
    with contextlib.closing(batches):
        next(batches)
        began, used, waited = time.perf_counter(), time.process_time(), 0.0
        for _ in range(_BATCHES.value):
            time.sleep(_STEP.value)
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        used = time.process_time() - used
        return waited / (time.perf_counter() - began), used / _BATCHES.value


def flops_of_a_picture(folder: Path) -> float:
    """Model FLOPs of training mPLUG-base on one pair: forward, backward and the teacher."""
    config = pretrain_base.get_config()
    with config.unlocked():
        # Pictures and words do not matter here, their sizes do.
        config.data.train = ({"kind": "scenes", "level": "easy", "split": "train", "size": 200},)
        config.data.tokenizer = {"kind": "sentencepiece", "vocab_size": 300, "texts": ()}
        config.model.text.vocab_size = 30_522
        config.evals = {}
    task = build_task(config, str(folder)).without_remat()
    mesh = make_mesh(config.mesh)
    source, _ = task.sources[0]
    example = task.make_example(source[0], np.random.default_rng(0))
    example |= {"valid": np.True_, "bad": np.int32(0)}
    batch = abstract_batch(example, BATCH, mesh)
    params = jax.eval_shape(task.init_params, jax.random.key(0))
    extra = jax.eval_shape(task.init_extra, jax.random.key(0))

    def loss(params, momentum, extra, batch):
        rng = jax.random.key(0)
        return task.loss(params, momentum, extra, batch, rng, np.int32(0))[0]

    with jax.set_mesh(mesh):
        return matmul_flops(jax.grad(loss), params, params, extra, batch) / BATCH


def show_rates(plain: dict[str, Rate], augmented: dict[str, Rate]) -> None:
    """The table of both measurements."""
    columns = f"{'CPU':>7}{'ratio':>7}{'mean':>7}{'wall':>7}"
    print(f"{'pictures/s of one core':<28}{columns}   RandAugment:{columns}")
    for name in plain:
        line = f"{name:<28}"
        for rates, gap in ((plain, 7), (augmented, 22)):
            rate, ratio = rates[name], rates[name].processor / rates[EXACT].processor
            line += f"{rate.processor:>{gap}.0f}{ratio:>7.2f}{rate.mean:>7.0f}{rate.wall:>7.0f}"
        print(line)
    if "torchvision" not in plain:
        print(f"{'torchvision':<28}  not installed, not measured (pip install torchvision)")
    kept = plain[FAST].processor >= TARGET
    print(
        f"target: {TARGET} by the fast decoder without RandAugment: {'met' if kept else 'MISSED'}"
    )


def main(_: list[str]) -> None:
    """Measures and prints; exit status 1 where a target is missed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_photos(folder, _PICTURES.value)
        size = sum(map(os.path.getsize, paths)) / len(paths) / 1024
        load = os.getloadavg()[0]
        print(
            f"{len(paths)} JPEGs of {WIDTH}x{HEIGHT}, {size:.0f} KiB on average, to {SIDE} px; "
            f"{os.cpu_count()} cores, load average {load:.1f} before the start"
        )
        plain, augmented = (measure(ways(augment), paths) for augment in (False, True))
        show_rates(plain, augmented)
        missed = plain[FAST].processor < TARGET
        how = f"{_WORKERS.value} workers, {_THREADS.value} threads"
        print(f"\nwaiting for batches of {BATCH} between steps of {_STEP.value} s ({how}):")
        for decoder in ("pillow", "fast"):
            share, used = waiting(folder, decoder)
            missed |= decoder == "fast" and share > MOST_WAIT
            cost = "" if _WORKERS.value else f"; {used:.3f} s of processor a batch"
            print(f"  {decoder:<8}{share:>8.2%} of the time (target {MOST_WAIT:.0%}){cost}")
        flops = flops_of_a_picture(folder)
    consumed = UTILISATION * PEAK / flops
    print(
        f"\nmPLUG-base at {SIDE} px: {flops / 1e9:.0f} GFLOP a picture; an H100 at "
        f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s trains on {consumed:.0f} pictures/s"
    )
    for way, rate in augmented.items():
        print(f"  {way:<28}{consumed / rate.processor:>6.1f} cores feed it, RandAugment included")
    sys.exit(int(missed))


if __name__ == "__main__":
    app.run(main)
