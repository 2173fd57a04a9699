"""How long decoding and encoding take, and how much memory, over the sizes of pictures.

    python examples/benchmark.py -o benchmark                                    # SD1's size, the parts and sizes below
    python examples/benchmark.py -o benchmark --sizes 1024 --parts decode --adapter other.py --repeats 5
    python examples/benchmark.py -o benchmark --plot a.json b.json               # the table and the chart of other runs

prints a table, and writes benchmark.json with every measurement, and benchmark.png, a chart (needs matplotlib).

    ours      vae.decode(z), vae.encode(x)
    bounded   the same with the least max_memory that is accepted
    tiled     the same after enable_tiling(): approximate, and no other than `ours` where a tile holds the picture
    whole     the same layers one after the other, without slabs
    torch     diffusers' AutoencoderKL on torch, on the same kind of device, in channels_last

An adapter is a Python file that brings another contender, named after the file. It defines `load(config, dtype)`, where
config is a dict with the fields of diffusers' config.json, and dtype "float32", "float16" or "bfloat16". What that
returns has one or both of

    decode(z)   latents (1, h, w, C), unscaled -> pictures (1, H, W, 3)
    encode(x)   pictures (1, H, W, 3) in [-1, 1] -> the posterior's mean (1, h, w, C)

NumPy arrays in and out, float32 in. Weights may be any: speed doesn't depend on them, and all models here are random.

Each measurement is one run in a process of its own, after one of 64 px that sets everything up; it includes the
conversion from and to NumPy. The contenders take turns, so that a machine that slows down does so for all of them.
`peak` is the most that the process held during the run, with the interpreter, its libraries and the weights; `before`
what it held before the run; `MLX peak` what MLX says that it held, with the weights. On macOS `peak` and `before` are
the most since the process began. A contender that fails is not run again at that size.
"""

from __future__ import annotations

import mlx_vae  # isort: skip  (before mlx: see mlx_vae/blas.py)

import argparse
import ast
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussianDistribution, cli, convert
from mlx_vae.config import FAMILIES
from mlx_vae.files import replacing

PARTS = ("decode", "encode")
SIZES = (256, 512, 1024)
WARM_UP = 64
GIB = 1 << 30


# Contenders: Contender(config, dtype) is what an adapter's load(config, dtype) is


class Ours:
    def __init__(self, config: dict[str, Any], dtype: str) -> None:
        self.vae = random_model(AutoencoderKLConfig.from_dict(config), cli.DTYPES[dtype])

    def decode(self, z: np.ndarray) -> np.ndarray:
        return to_numpy(self.vae.decode(mx.array(z)).sample)

    def encode(self, x: np.ndarray) -> np.ndarray:
        return to_numpy(self.vae.encode(mx.array(x)).latent_dist.mean)


class Bounded(Ours):
    def decode(self, z: np.ndarray) -> np.ndarray:
        return to_numpy(self.vae.decode(mx.array(z), max_memory=self.vae.decode_memory(z.shape).least).sample)

    def encode(self, x: np.ndarray) -> np.ndarray:
        least = self.vae.encode_memory(x.shape).least
        return to_numpy(self.vae.encode(mx.array(x), max_memory=least).latent_dist.mean)


class Tiled(Ours):
    def __init__(self, config: dict[str, Any], dtype: str) -> None:
        super().__init__(config, dtype)
        self.vae.enable_tiling()


class Whole(Ours):
    def decode(self, z: np.ndarray) -> np.ndarray:
        return to_numpy(self.vae._decode(mx.array(z, dtype=self.vae.dtype)))

    def encode(self, x: np.ndarray) -> np.ndarray:
        return to_numpy(DiagonalGaussianDistribution(self.vae._encode(mx.array(x, dtype=self.vae.dtype))).mean)


class Torch:
    def __init__(self, config: dict[str, Any], dtype: str) -> None:
        import diffusers
        import torch

        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.device = "cpu"
        if mx.default_device() != mx.Device(mx.cpu):
            self.device = "mps" if torch.backends.mps.is_available() else "cuda"
        kind = getattr(diffusers, config["_class_name"])
        model = kind(**{name: value for name, value in config.items() if not name.startswith("_")}).eval()
        self.model = model.to(self.device, self.dtype, memory_format=torch.channels_last)

    def decode(self, z: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self._from_torch(self.model.decode(self._to_torch(z)).sample)

    def encode(self, x: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self._from_torch(self.model.encode(self._to_torch(x)).latent_dist.mean)

    def _to_torch(self, x: np.ndarray) -> Any:
        # NHWC -> NCHW, of which NHWC in memory is what torch calls channels_last
        return self.torch.from_numpy(x).permute(0, 3, 1, 2).to(self.device, self.dtype)

    def _from_torch(self, x: Any) -> np.ndarray:
        return x.float().cpu().permute(0, 2, 3, 1).numpy()  # NCHW -> NHWC


CONTENDERS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "ours": Ours,
    "bounded": Bounded,
    "tiled": Tiled,
    "whole": Whole,
    "torch": Torch,
}


def random_model(config: AutoencoderKLConfig, dtype: mx.Dtype) -> AutoencoderKL:
    """With weights that keep activations near 1, made one by one: all at once would take more memory than a run."""
    mx.random.seed(0)
    vae = AutoencoderKL(config)
    weights: list[tuple[str, Any]] = []
    for name, value in vae.named_parameters().items():
        noise = mx.random.normal(value.shape)
        if "norm" in name:
            noise = 0.3 * noise + (1 if name.endswith("weight") else 0)
        else:
            noise = 0.1 * noise if noise.ndim == 1 else noise * (noise.size / len(noise)) ** -0.5
        weights.append((name, noise.astype(dtype)))
        mx.eval(weights[-1][1])
    vae.update(tree_unflatten(weights))
    return vae


def to_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def load_adapter(path: str) -> Callable[[dict[str, Any], str], Any]:
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.load


# One measurement, in a process of its own


def work(job: dict[str, Any]) -> dict[str, Any] | None:
    """Loads a contender and times one run; None if it hasn't got that part. Raises whatever the contender raises."""
    load = load_adapter(job["adapter"]) if job["adapter"] else CONTENDERS[job["contender"]]
    run = getattr(load(job["config"], job["dtype"]), job["part"], None)
    if run is None:
        return None
    config = AutoencoderKLConfig.from_dict(job["config"])
    inputs = {size: random_input(config, job["part"], size) for size in {min(WARM_UP, job["size"]), job["size"]}}
    np.asarray(run(inputs[min(WARM_UP, job["size"])]))
    mx.clear_cache()
    mx.reset_peak_memory()
    with contextlib.suppress(OSError):  # Linux: the peak begins anew, so that what loading took doesn't count
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    result = np.asarray(run(inputs[job["size"]]))
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    latent = job["size"] // config.factor
    shapes = {
        "decode": (1, job["size"], job["size"], config.out_channels),
        "encode": (1, latent, latent, config.latent_channels),
    }
    if result.shape != shapes[job["part"]]:
        raise ValueError(f"{job['part']} gave shape {result.shape}, wanted {shapes[job['part']]}")
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "before_bytes": before,
        "mlx_peak_bytes": mx.get_peak_memory() or None,
    }


def random_input(config: AutoencoderKLConfig, part: str, size: int) -> np.ndarray:
    """Latents for a picture of size x size px, or such a picture."""
    random = np.random.default_rng(0)
    if part == "encode":
        return random.uniform(-1, 1, (1, size, size, config.in_channels)).astype(np.float32)
    latent = size // config.factor
    return random.standard_normal((1, latent, latent, config.latent_channels)).astype(np.float32)


def resident_bytes(field: str) -> int:
    """What this process holds (VmRSS), or has held at most (VmHWM). macOS tells the most alone, of all the time."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(f"{field}:"))


def worker(job: str) -> int:
    """Writes what `work` returns to stdout, as JSON; whatever a contender prints goes to stderr."""
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        json.dump(work(json.loads(job)), stdout)
    return 0


def measure(job: dict[str, Any], timeout: float | None) -> dict[str, Any] | None:
    """What `work` returns in a process of its own, or {"error": line} if it fails there."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:g} s"}
    if done.returncode == 0 and done.stdout:
        return json.loads(done.stdout)
    reasons = [signal.Signals(-done.returncode).name] if done.returncode < 0 else []
    reasons += [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"error": ": ".join(reasons) or f"exit status {done.returncode}, without a result"}


# All of them


def benchmark(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    json_path, chart_path = Path(f"{output}.json"), Path(f"{output}.png")
    if arguments.plot:
        report = load_reports(arguments.plot)
        print(table(report))
        plot(report, chart_path)
        return 0
    vae_config = convert.open_pretrained(arguments.model).config if arguments.model else FAMILIES["sd"]
    adapters = find_adapters(arguments.adapter)
    if arguments.no_attention:
        vae_config = dataclasses.replace(vae_config, mid_block_add_attention=False)
    contenders = find_contenders(arguments.contenders) + list(adapters)
    for size in arguments.sizes:
        if size < 1 or size % vae_config.factor:
            raise ValueError(f"size {size}: wanted a multiple of {vae_config.factor}")
    if arguments.repeats < 1:
        raise ValueError(f"--repeats is {arguments.repeats}; it must be at least 1")
    output.parent.mkdir(parents=True, exist_ok=True)

    report = {
        "platform": describe_platform(),
        "model": (arguments.model or "SD1") + (" without attention" if arguments.no_attention else ""),
        "config": vae_config.to_dict(),
        "dtype": arguments.dtype,
        "contenders": contenders,
        "measurements": [],
    }
    jobs = [
        {"repeat": repeat, "part": part, "size": size, "contender": contender}
        for repeat in range(arguments.repeats)
        for part in arguments.parts
        for size in arguments.sizes
        for contender in contenders
    ]
    given_up: set[tuple[str, str, int]] = set()
    status = 0
    try:
        for number, job in enumerate(jobs, start=1):
            point = job["contender"], job["part"], job["size"]
            if point in given_up:
                continue
            common = {"adapter": adapters.get(job["contender"]), "config": report["config"], "dtype": arguments.dtype}
            result = measure(job | common, arguments.timeout)
            if result is None or "error" in result:
                given_up.add(point)
            if result is not None:
                report["measurements"].append(job | result)
                with replacing(json_path) as path:  # each time: hours of measurements outlive whatever ends this
                    path.write_text(json.dumps(report, indent=1) + "\n")
                said = result.get("error") or f"{result['seconds']:.3f} s"
                cli.notice(f"[{number}/{len(jobs)}] {job['part']} {job['size']} {job['contender']}: {said}")
    except KeyboardInterrupt:
        cli.notice("interrupted")
        status = cli.INTERRUPTED
    if report["measurements"]:
        print(table(report))
        print(json_path)
        try:
            plot(report, chart_path)
            print(chart_path)
        except ImportError:
            cli.notice(f"no chart: matplotlib is not installed; with it, --plot {json_path} draws one")
    return status


def load_reports(paths: Sequence[str]) -> dict[str, Any]:
    """All of them as one. Raises ValueError for what is no report, and for reports of different things."""
    whole: dict[str, Any] = {}
    for path in paths:
        try:
            report = json.loads(Path(path).read_text())
            same = {key: report[key] for key in ("platform", "model", "config", "dtype")}
            contenders, measurements = report["contenders"], report["measurements"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a report of this program ({error})") from None
        if any(whole.get(key, value) != value for key, value in same.items()):
            raise ValueError(f"{path}: of another machine, model or dtype than {paths[0]}")
        whole = same | {
            "contenders": list(dict.fromkeys(whole.get("contenders", []) + contenders)),
            "measurements": whole.get("measurements", []) + measurements,
        }
    return whole


def find_contenders(names: Sequence[str] | None) -> list[str]:
    """Those asked for, or all, but `torch` where it can't be. Raises ValueError for an unknown one."""
    for name in names or ():
        if name not in CONTENDERS:
            raise ValueError(f"no contender is called {name!r}; there are {', '.join(CONTENDERS)}")
    contenders = list(dict.fromkeys(CONTENDERS if names is None else names))
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if "torch" in contenders and missing:
        cli.notice(f"torch is left out: {' and '.join(missing)} can't be found")
        contenders.remove("torch")
    return contenders


def find_adapters(paths: Sequence[str]) -> dict[str, str]:
    """{contender: path}. Raises ValueError for what is no adapter, without running it, and for a name that is taken."""
    adapters: dict[str, str] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            statements = ast.parse(path.read_bytes()).body
        except SyntaxError as error:
            raise ValueError(f"{path}: not Python ({error})") from None
        if not any(isinstance(node, ast.FunctionDef) and node.name == "load" for node in statements):
            raise ValueError(f"{path}: it defines no function load(config, dtype)")
        if path.stem in CONTENDERS or path.stem in adapters:
            raise ValueError(f"{path}: there is a contender {path.stem!r} already; rename the file")
        adapters[path.stem] = str(path.resolve())
    return adapters


def describe_platform() -> dict[str, Any]:
    versions = {}
    for package in ("mlx", "numpy", "torch", "diffusers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "device": "CPU" if on_cpu else "GPU",
        "python": platform.python_version(),
        "mlx_vae": mlx_vae.__version__,
        **versions,
    }


def processor_name() -> str:
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


# The table and the chart


def table(report: dict[str, Any]) -> str:
    """A row for each part, size and contender: medians over the repeats, and how they compare to `ours`."""
    lines = [
        f"{'part':6} {'size':>5} {'contender':12} {'seconds':>8} {'min':>8} {'max':>8} {'ratio':>6}"
        f" {'peak':>6} {'before':>6} {'MLX peak':>8}  (GiB)"
    ]
    points = dict.fromkeys((m["part"], m["size"]) for m in report["measurements"])
    for part, size in points:
        ours = median(report, part, size, "ours", "seconds")
        for contender in report["contenders"]:
            found = select(report, part, size, contender)
            start = f"{part:6} {size:5} {contender:12}"
            lines += [f"{start} failed: {m['error']}" for m in found if "error" in m]
            seconds = [m["seconds"] for m in found if "seconds" in m]
            if seconds:
                middle = statistics.median(seconds)
                ratio = f"{middle / ours:.2f}" if ours else "-"
                memory = [
                    median(report, part, size, contender, f"{key}_bytes") for key in ("peak", "before", "mlx_peak")
                ]
                peak, before, mlx_peak = ("-" if value is None else f"{value / GIB:.2f}" for value in memory)
                lines.append(
                    f"{start} {middle:8.3f} {min(seconds):8.3f} {max(seconds):8.3f} {ratio:>6}"
                    f" {peak:>6} {before:>6} {mlx_peak:>8}"
                )
    return "\n".join(lines)


def select(report: dict[str, Any], part: str, size: int, contender: str) -> list[dict[str, Any]]:
    wanted = {"part": part, "size": size, "contender": contender}
    return [m for m in report["measurements"] if m.items() >= wanted.items()]


def median(report: dict[str, Any], part: str, size: int, contender: str, key: str) -> float | None:
    """None where nothing was measured."""
    values = [m[key] for m in select(report, part, size, contender) if m.get(key) is not None]
    return statistics.median(values) if values else None


def plot(report: dict[str, Any], path: Path) -> None:
    """Time and memory over sizes, a row of panels for each part; a cross stands above a size that failed."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    parts = list(dict.fromkeys(m["part"] for m in report["measurements"]))
    sizes = sorted({m["size"] for m in report["measurements"]})
    figure, grid = plt.subplots(len(parts), 2, figsize=(9, 0.8 + 3 * len(parts)), squeeze=False, layout="constrained")
    for part, row in zip(parts, grid, strict=True):
        for axes, key, unit in zip(row, ("seconds", "peak_bytes"), (1, GIB), strict=True):
            for number, contender in enumerate(report["contenders"]):
                color = f"C{number}"
                medians = {size: median(report, part, size, contender, key) for size in sizes}
                drawn = {size: value / unit for size, value in medians.items() if value is not None}
                axes.plot(list(drawn), list(drawn.values()), "o-", color=color, markersize=4, label=contender)
                failed = [size for size in sizes if any("error" in m for m in select(report, part, size, contender))]
                high = [0.97 - 0.05 * number] * len(failed)
                axes.plot(failed, high, "x", color=color, transform=axes.get_xaxis_transform())
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(color="0.9")
            axes.set_xlabel("side of the picture in pixels")
            axes.set_ylabel(f"{part}: seconds" if key == "seconds" else f"{part}: peak memory in GiB")
    grid[0, 0].legend()
    about = report["platform"]
    machine = f"{about['cores']} cores {about['machine'].replace('_', '-')}, MLX on the {about['device']}"
    figure.suptitle(f"{machine}, {report['dtype']}, {report['model']}")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the time and the memory of decoding and encoding.")
    parser.add_argument("-o", "--output", required=True, metavar="STEM", help="STEM.json and STEM.png are written")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of pictures in px (256 512 1024)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(both)")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help=f"of {', '.join(CONTENDERS)} (all)")
    parser.add_argument("--adapter", nargs="+", action="extend", default=[], metavar="FILE", help="more contenders")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is measured (3)")
    parser.add_argument("--dtype", choices=list(cli.DTYPES), default="float32", help="(float32)")
    parser.add_argument("--model", help="take its configuration, not SD1's: tiny, a folder, a file, one on the hub")
    parser.add_argument(
        "--no-attention", action="store_true", help="leave out what grows with the square of the pixels"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="what takes longer has failed (no limit)")
    parser.add_argument("--plot", nargs="+", metavar="FILE", help="measure nothing; draw the JSON files of other runs")
    return cli.run(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(worker(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else main())
