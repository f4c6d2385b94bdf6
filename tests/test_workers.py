"""Encoders in processes, data loaders and threads; their copies; inference mode before training; interrupts."""

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from featsharp.backbones import from_callable
from featsharp.backbones.adapters import captured
from featsharp.builder import create_encoder, load_from_file
from featsharp.configs.compose import compose
from featsharp.errors import CheckpointError, InputError
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.upsamplers import GuidedUpsampler, UpsampleFeatures, list_upsamplers
from featsharp.upsamplers.layer import UpsampleLayer

STARTS = multiprocessing.get_all_start_methods()
# AnyUp takes ten times as long as the others.
LONG = ("anyup", "naf", "uplift")  # ten times as long as others
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in list_upsamplers()]


def nearest(image, features, size):
    return F.interpolate(features, size, mode="nearest")


def double(images):
    return F.interpolate(images, scale_factor=2, mode="bicubic")


OPTIONS: dict[str, dict[str, Any]] = {"custom": {"function": nearest}, "super-resolution": {"enlarge": double}}


def build(name: str, **options: Any) -> SharpEncoder:
    factor = 1 if name in ("identity", "s2-pooled") else 2
    return create_encoder("toy-vit", name, factor, upsampler_options=OPTIONS.get(name, {}), **options)


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8 + number % 2, 3), np.uint8)
    return Image.fromarray(pixels).resize((80, 60))


@torch.no_grad()
def sharpen(encoder: SharpEncoder, images: Tensor) -> Tensor:
    return encoder(images).high_res


@pytest.fixture
def images() -> Tensor:
    return F.interpolate(torch.randn(2, 3, 6, 8), (64, 80), mode="bicubic")


# Processes

CHILD = """
import multiprocessing, sys
import numpy as np, torch
from PIL import Image
from featsharp import create_encoder

def work(encoder, queue):
    queue.put(encoder.encode_image(picture, size=(256, 384)).high_res.numpy())

picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).resize((300, 200))
if __name__ == "__main__":
    assert torch.get_num_threads() == 2
    encoder = create_encoder("toy-vit", "tile", 2)
    expected = encoder.encode_image(picture, size=(256, 384)).high_res  # starts the threads
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=work, args=(encoder, queue), daemon=True)
    process.start()
    found = torch.from_numpy(queue.get(timeout=100))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.get_num_threads() == 2
"""


@pytest.mark.parametrize("start", [s if s == "fork" else pytest.param(s, marks=pytest.mark.slow) for s in STARTS])
def test_a_worker_process_encodes_after_its_parent_did(start, tmp_path, clean_environment):
    """A fork would wait for ever for the threads of its parent."""
    (tmp_path / "child.py").write_text(CHILD)
    environment = clean_environment | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "child.py"), start]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


class Pictures(Dataset[Any]):
    """Features of pictures, from an encoder that is given or built by the worker."""

    def __init__(self, encoder: SharpEncoder | None, *, size: tuple[int, int] | None = (64, 80), summary: bool = False):
        self.encoder, self.size, self.summary = encoder, size, summary

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        self.encoder = self.encoder or create_encoder("toy-vit", "tile", 2)
        out = self.encoder.encode_image(picture(index), size=self.size, return_summary=self.summary)
        return {"features": out, "label": index}


@pytest.mark.parametrize(
    ("workers", "start", "lazy", "summary"),
    [
        *((0, None, lazy, summary) for lazy in (False, True) for summary in (False, True)),
        # With each start either way to get the encoder; results with and without a summary are stacked alike.
        *(pytest.param(2, start, lazy, lazy, marks=pytest.mark.slow) for start in STARTS for lazy in (False, True)),
    ],
)
def test_a_data_loader_of_features(workers, start, lazy, summary):
    encoder = create_encoder("toy-vit", "tile", 2)
    dataset = Pictures(None if lazy else encoder, summary=summary)
    options: dict[str, Any] = {"multiprocessing_context": start, "persistent_workers": True} if workers else {}
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, pin_memory=torch.cuda.is_available(), **options)
    for _ in range(2):
        batches = list(loader)
        assert [batch["label"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
        for batch in batches:
            expected = [
                encoder.encode_image(picture(n), size=(64, 80), return_summary=True) for n in batch["label"].tolist()
            ]
            out = batch["features"]
            assert isinstance(out, UpsampleFeatures)
            torch.testing.assert_close(out.low_res.cpu(), torch.cat([one.low_res for one in expected]))
            torch.testing.assert_close(out.high_res.cpu(), torch.cat([one.high_res for one in expected]))
            if summary:
                torch.testing.assert_close(out.summary.cpu(), torch.cat([one.summary for one in expected]))
            else:
                assert out.summary is None


def test_features_of_several_sizes_are_no_batch():
    class Uneven(Pictures):
        def __getitem__(self, index: int) -> Any:
            return self.encoder.encode_image(picture(0).resize((60 + 30 * index, 60)))

    encoder = create_encoder("toy-vit", "tile", 2)
    with pytest.raises(
        InputError, match=r"several sizes are no batch: \d+x\d+ tokens with .*; give encode_image one size="
    ):
        list(DataLoader(Uneven(encoder), batch_size=5))
    assert len(list(DataLoader(Uneven(encoder), batch_size=None))) == 5


# Threads


@pytest.mark.parametrize(
    "name", [n if n == "featsharp" else pytest.param(n, marks=pytest.mark.slow) for n in list_upsamplers()]
)
def test_threads_share_an_encoder(name):
    """With settings of torch and limits of memory that belong to one thread or to all."""
    encoder = build(name)
    limited = copy.copy(encoder)
    if name in ("tile", "featsharp"):
        limited.max_memory = "1GiB"
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1 + n % 2, 3, 40 + 8 * (n % 3), 48, generator=generator) for n in range(8)]

    def run(number: int) -> Tensor:
        if number % 4 == 0:
            with torch.inference_mode():
                return encoder(batches[number]).high_res
        if number % 4 == 1:
            with torch.autocast("cpu", torch.bfloat16):
                return sharpen(encoder, batches[number])
        return sharpen(limited if number % 4 == 2 else encoder, batches[number])

    expected = [run(number) for number in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_encoder_may_be_called_from_within_its_own_upsampler(images):
    inner = create_encoder("toy-vit", "tile", 2)

    def ask_again(image, features, size):
        return F.interpolate(inner(image).low_res, size)

    outer = create_encoder(inner.backbone, "custom", 2, upsampler_options={"function": ask_again})
    assert torch.equal(sharpen(outer, images), F.interpolate(inner(images).low_res, (16, 20)))


# Copies


def copies(encoder: SharpEncoder) -> list[SharpEncoder]:
    return [copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))]


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_encoders_of_their_own(name, images):
    encoder = build(name, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(32)
    with torch.no_grad():
        statistics.update(encoder.backbone(images).features)
    encoder.normalizer.fit(statistics)
    before = copies(encoder)
    expected = sharpen(encoder, images)
    encoder(images).high_res.square().mean().backward()
    for made in [*before, *copies(encoder)]:
        assert torch.equal(sharpen(made, images), expected)
        with torch.no_grad():
            for tensor in (*made.parameters(), *made.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.5)
        assert not torch.equal(sharpen(made, images), expected)
        assert made.backbone.weights_hash() != encoder.backbone.weights_hash()
    assert torch.equal(sharpen(encoder, images), expected)
    assert torch.equal(sharpen(copy.copy(encoder), images), expected)


def test_a_copy_of_a_compiled_or_limited_encoder(images):
    encoder = create_encoder("toy-vit", "tile", 2, max_memory="1GiB")
    expected = sharpen(encoder, images)
    encoder.compile(backend="eager")
    for made in copies(encoder):
        assert made.max_memory == 2**30
        assert torch.equal(sharpen(made, images), expected)
        made.max_memory = None
    assert encoder.max_memory == 2**30


def test_layers_and_methods_of_modules_are_copied_with_their_weights():
    layer = UpsampleLayer("resize-conv", 16, 2, recompute=True)
    features, image = torch.randn(1, 16, 3, 4), torch.randn(1, 3, 24, 32)
    layer(features, image).sum().backward()
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made(features, image), layer(features, image))

    trunk = Trunk()
    backbone = from_callable(trunk.encode, patch_size=8, input_size=(64, 64))
    made = copy.deepcopy(backbone)
    with torch.no_grad():
        trunk.conv.weight.zero_()
        assert not torch.equal(made(torch.ones(1, 3, 64, 64)).features, backbone(torch.ones(1, 3, 64, 64)).features)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, 8)

    def encode(self, images: Tensor) -> Tensor:
        return self.conv(images)


def test_configurations_are_pickled_and_whole_encoders_are_no_checkpoints(tmp_path):
    config = compose(["+model=toy-vit", "+upsampler=featsharp-2x", "train_data_dir=photos"])
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    torch.save(create_encoder("toy-vit", "tile", 2), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_from_file(tmp_path / "whole.pth")


@pytest.mark.slow
def test_fifty_calls_leave_no_tensor_behind(images):
    encoder = create_encoder("toy-vit", "featsharp", 2)

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    for limit in (None, "1GiB"):
        encoder.max_memory = limit
        sharpen(encoder, images[:1, :, :32, :32])
        before = count()
        for _ in range(50 if limit is None else 5):
            sharpen(encoder, images[:1, :, :32, :32])
        assert count() == before


# Inference mode, and modes of the autograd engine


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_before_training(name, images):
    """Encoders that were built and used in it, and images and features that were made in it."""
    with torch.inference_mode():
        encoder = build(name, bias_buffer=True)
        encoder(images)
        made, features = images.clone(), torch.randn(2, 32, 8, 10)
    encoder.train()
    for given in (images, made):
        out = encoder(given).high_res
        assert not out.is_inference()
        out.square().mean().backward()
    assert encoder.bias_buffer.buffer.grad.abs().sum() > 0
    if isinstance(encoder.upsampler, GuidedUpsampler) and encoder.upsampler.trainable:
        UpsampleLayer(encoder.upsampler)(features, made).square().mean().backward()
    torch.optim.SGD([*encoder.upsampler.parameters(), encoder.bias_buffer.buffer]).step()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms_and_the_search_for_anomalies(name, images):
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            for given in (images, torch.zeros_like(images)):
                build(name, bias_buffer=True).train()(given).high_res.square().mean().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_moved_shared_and_distributed_after_use(images):
    encoder = create_encoder("toy-vit", "featsharp", 2, bias_buffer=True)
    expected = sharpen(encoder, images)
    assert torch.equal(sharpen(encoder.double().float().to("cpu").share_memory(), images), expected)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(encoder.train())
        parallel(images, return_summary=True).high_res.square().mean().backward()
        assert all(p.grad is not None for p in encoder.upsampler.parameters())
    finally:
        torch.distributed.destroy_process_group()


# Compilation

SIZES = [(64, 64), (72, 96), (96, 72), (120, 64), (64, 136), (48, 56), (104, 104), (88, 160), (160, 88), (40, 72)]


# torch compiles the user's function of super-resolution anew for sizes of its own.
COMPILED = [n for n in list_upsamplers() if n != "super-resolution"]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMPILED)
def test_ten_sizes_of_images_take_at_most_six_graphs(name):
    """One for images that are shrunk, enlarged or left, alone or several; a seventh would be an error here."""
    encoder = build(name)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1 + n % 3, 3, *size, generator=generator) for n, size in enumerate(SIZES)]
    expected = [sharpen(encoder, batch) for batch in batches]
    torch._dynamo.reset()
    encoder.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=6, fail_on_recompile_limit_hit=True):
        for batch, high_res in zip(batches, expected, strict=True):
            torch.testing.assert_close(sharpen(encoder, batch), high_res, atol=1e-4, rtol=1e-4)


# Interrupts


def test_an_interrupt_leaves_no_hooks():
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    layers = [nn.Identity(), Interrupted()]
    with pytest.raises(KeyboardInterrupt), captured(layers):
        nn.Sequential(*layers)(torch.ones(1))
    with pytest.raises(AttributeError), captured([layers[0], None]):  # interrupted while hooks are registered
        pass
    assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupted_command_leaves_whole_files(tmp_path, clean_environment):
    (tmp_path / "photos").mkdir()
    for number in range(200):
        picture(number).save(tmp_path / "photos" / f"{number:03}.png")
    command = [sys.executable, "-m", "featsharp.cli.main", "upsample", "photos", "--checkpoint", "tile-2x"]
    command += ["--backbone", "toy-vit", "-o", "out"]
    environment = clean_environment | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((tmp_path / "out").glob("00[3-9].png")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in message
    from safetensors.torch import load_file

    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert 4 <= len(written) < 400
    assert {Path(name).suffix for name in written} == {".png", ".safetensors"}
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".png":
            Image.open(path).load()
        else:
            assert load_file(path)["high_res"].isfinite().all()
