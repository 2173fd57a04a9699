"""The encode command on whole folders: reruns, kills, several processes, damaged pictures."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from models import SMALL, random_model
from pictures import contents, make_folder, random_picture
from PIL import Image

from mlx_vae import AutoencoderKLConfig, decode
from mlx_vae.decode import decode_files
from mlx_vae.encode import Settings, encode_files, main
from mlx_vae.files import writing_into
from mlx_vae.latents import load_latents

COUNT = 75  # more than two chunks
TIMEOUT = 300  # seconds, for a machine that is busy with other things


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    make_folder(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, photos: Path, model: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = encode_files([photos], out, model, Settings(seed=1))
    assert (report.encoded, report.skipped, report.failed) == (COUNT, 0, 0)
    return contents(out)


def command(photos: Path, out: Path, model: Path) -> list[str]:
    flags = ["--model", str(model), "--sample", "--seed", "1"]
    return [sys.executable, "-m", "mlx_vae.encode", str(photos), "-o", str(out), *flags]


def test_the_structure_is_kept(photos: Path, whole: dict[str, bytes]) -> None:
    pictures = [path.relative_to(photos) for path in photos.rglob("*.png")]
    assert sorted(whole) == sorted(path.with_suffix(".safetensors").as_posix() for path in pictures)


def test_a_folder_comes_back_as_pictures(
    tmp_path: Path, photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_files([photos / "below"], tmp_path / "z", model)
    assert decode.main([str(tmp_path / "z"), "-o", f"{tmp_path}/back/", "--format", "webp", "--lossless"]) == 0
    back = {path.stem: path for path in (tmp_path / "back").rglob("*.webp")}
    assert sorted(back) == sorted(path.stem for path in (photos / "below").iterdir())
    for path in (photos / "below").iterdir():
        with Image.open(path) as original, Image.open(back[path.stem]) as picture:
            assert picture.size == original.size
    assert len(capsys.readouterr().out.splitlines()) == len(back)


def test_a_rerun_does_nothing(tmp_path: Path, photos: Path, model: Path) -> None:
    encode_files([photos], tmp_path / "out", model)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    report = encode_files([photos], tmp_path / "out", model)
    assert (report.encoded, report.skipped, report.failed) == (0, COUNT, 0)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_rerun_redoes_what_is_missing_damaged_or_changed(
    tmp_path: Path, photos: Path, model: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    encode_files([photos], out, model, Settings(seed=1))
    files = sorted(out.rglob("*.safetensors"))
    files[3].unlink()
    files[20].write_bytes(files[20].read_bytes()[:-1])
    files[21].write_bytes(b"")
    files[40].write_bytes(files[41].read_bytes())
    report = encode_files([photos], out, model, Settings(seed=1))
    assert (report.encoded, report.skipped) == (4, COUNT - 4)
    assert contents(out) == whole


def test_a_rerun_sees_other_sources_models_and_settings(tmp_path: Path, photos: Path, model: Path) -> None:
    source, out = tmp_path / "a.png", tmp_path / "z.safetensors"

    def encoded(settings: Settings | None = None, by: Path = model) -> int:
        return encode_files([source], out, by, settings).encoded

    random_picture(12, 12, seed=1).save(source)
    assert [encoded(), encoded()] == [1, 0]
    before = source.stat()
    random_picture(12, 12, seed=2).save(source)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [encoded(), encoded()] == [1, 0]
    os.utime(source)
    assert encoded() == 0
    for settings in (
        Settings(seed=0),
        Settings(seed=1),
        Settings(scaled=False),
        Settings(dtype=mx.bfloat16),
        Settings(background="black"),
        Settings(resize=(8, 8)),
        Settings(tile=True),
        Settings(max_side=8),
    ):
        assert [encoded(settings), encoded(settings)] == [1, 0]
    assert encoded(Settings(max_side=8, batch_size=2)) == 0
    random_model(SMALL, seed=1).save_pretrained(tmp_path / "other")
    assert [encoded(), encoded(by=tmp_path / "other"), encoded(by=tmp_path / "other")] == [1, 1, 0]


def test_batches_do_not_depend_on_what_is_done(
    tmp_path: Path, photos: Path, model: Path, whole: dict[str, bytes]
) -> None:
    choose = random.Random(0)
    for _ in range(5):
        out = tmp_path / "out"
        encode_files([photos], out, model, Settings(seed=1))
        for file in out.rglob("*.safetensors"):
            if choose.random() < 0.5:
                file.unlink()
        encode_files([photos], out, model, Settings(seed=1))
        assert contents(out) == whole


def test_batch_sizes_agree(tmp_path: Path, photos: Path, model: Path) -> None:
    for batch_size in (1, 5, 64):
        encode_files([photos], tmp_path / str(batch_size), model, Settings(batch_size=batch_size))
    for name in contents(tmp_path / "1"):
        alone = load_latents(tmp_path / "1" / name).values
        for batch_size in (5, 64):
            assert mx.allclose(load_latents(tmp_path / str(batch_size) / name).values, alone, atol=1e-5)


def test_killed_at_any_moment(tmp_path: Path, photos: Path, model: Path, whole: dict[str, bytes]) -> None:
    """The process is stopped for good once it has written some files; then another ends the work."""
    out = tmp_path / "out"
    choose = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command(photos, out, model), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        have, wanted = len(contents(out)) if out.exists() else 0, choose.randint(1, 15)
        while process.poll() is None and (not out.exists() or sum(1 for _ in out.rglob("*")) < have + wanted):
            time.sleep(0.001)
        process.kill()
        process.wait()
    (out / "below").mkdir(parents=True, exist_ok=True)
    (out / "below" / ".picture 001.0123abcd.safetensors").write_bytes(b"half")  # as a kill amid a write leaves it
    (out / ".picture 000.89abcdef.safetensors").write_bytes(b"")
    assert main([*command(photos, out, model)[3:]]) == 0
    assert contents(out) == whole


def test_temporaries_of_a_live_run_are_left_alone(tmp_path: Path) -> None:
    target, temporary, foreign = (
        tmp_path / name for name in ("a.safetensors", ".a.0123abcd.safetensors", ".b.0123abcd.safetensors")
    )
    temporary.write_bytes(b"half")
    foreign.write_bytes(b"half")
    with writing_into(tmp_path, {target}):
        assert not temporary.exists()
        temporary.write_bytes(b"being written")
        with writing_into(tmp_path, {target}):
            assert temporary.exists()
    with writing_into(tmp_path, {target}):
        assert not temporary.exists()
    assert foreign.exists()


def test_interrupted(tmp_path: Path, photos: Path, model: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(photos, out, model), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (out.exists() and any(out.rglob("*.safetensors"))):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=TIMEOUT)
    if process.returncode:  # it may have been faster than the signal
        assert process.returncode == 130
        assert error.splitlines()[-1] == "interrupted"
    assert contents(out).items() <= whole.items()
    assert not list(out.rglob(".*"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_ranks(arguments: list[list[str]], hosts: Path) -> list[subprocess.CompletedProcess[str]]:
    """One process for each list of arguments, as `mlx.launch` starts them, in a ring on this machine."""
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(arguments))]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts)}
    processes = [
        subprocess.Popen(
            each, env={**environment, "MLX_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank, each in enumerate(arguments)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        subprocess.CompletedProcess(each, process.returncode, *output)
        for each, process, output in zip(arguments, processes, outputs, strict=True)
    ]


def test_two_processes_share_the_work(tmp_path: Path, photos: Path, model: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    first, second = run_ranks([command(photos, out, model)] * 2, tmp_path / "hosts.json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"{COUNT} encoded, 0 already done, 0 failed" in first.stderr
    assert (first.stdout.strip(), second.stdout) == (str(out), "")
    assert "encoded" not in second.stderr
    assert contents(out) == whole


def test_all_processes_know_of_a_failure(tmp_path: Path, model: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    both = run_ranks([command(tmp_path / "photos", tmp_path / "out", model)] * 2, tmp_path / "hosts.json")
    assert [each.returncode for each in both] == [1, 1], both
    assert "bad.png: not a picture" in both[0].stderr
    assert "bad.png" not in both[1].stderr


def test_processes_must_see_the_same_pictures(tmp_path: Path, photos: Path, model: Path) -> None:
    out = tmp_path / "out"
    both = run_ranks([command(photos, out, model), command(photos / "below", out, model)], tmp_path / "hosts.json")
    assert [each.returncode for each in both] == [2, 2]
    assert all("the processes see different pictures" in each.stderr for each in both)
    assert not out.exists()


def damaged_pictures(folder: Path) -> int:
    """200 files that are called pictures: cut short, of another kind, empty, of zeros, altered, too large."""
    folder.mkdir()
    kinds = ("png", "jpg", "webp", "gif", "bmp", "tiff")
    choose = random.Random(0)
    wholes = {}
    for kind in kinds:
        random_picture(40, 30).save(folder / f"whole.{kind}")
        wholes[kind] = (folder / f"whole.{kind}").read_bytes()
        (folder / f"whole.{kind}").unlink()
    huge = wholes["png"][:16] + struct.pack(">II", 60000, 60000) + wholes["png"][24:]
    for i, kind in zip(range(200), itertools.cycle(kinds), strict=False):
        data = wholes[kind]
        content = [
            data[: choose.randrange(1, len(data) // 2)],  # truncated
            wholes[kinds[(i + 1) % len(kinds)]],  # of another kind than its ending says
            b"",
            bytes(choose.randrange(1, 500)),
            bytes(choose.randrange(256) for _ in range(300)),
            b"%PDF-1.7 or something else",
            huge,
        ][i // len(kinds) % 7]
        (folder / f"{i:03}.{kind}").write_bytes(content)
    return 200


def test_damaged_pictures_each_get_a_line(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = damaged_pictures(tmp_path / "photos")
    random_picture(9, 9).save(tmp_path / "photos" / "good.png")
    assert main([str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--model", str(model)]) == 1
    lines = capsys.readouterr().err.splitlines()
    for i in range(count):
        assert sum(f"/{i:03}." in line for line in lines) == 1, i
    failed = sum(line.startswith("error: ") for line in lines)
    written = contents(tmp_path / "out")
    assert "good.safetensors" in written
    assert len(written) + failed == count + 1
    assert failed > 150
    assert f"{len(written)} encoded, 0 already done, {failed} failed" in lines[-1]


def test_large_pictures_come_back_in_their_sizes(tmp_path: Path) -> None:
    """Of one padded size but more pixels than a batch may hold together; without attention, for the memory's sake."""
    config = AutoencoderKLConfig(block_out_channels=(2, 2, 2, 2), norm_num_groups=1, mid_block_add_attention=False)
    random_model(config).save_pretrained(tmp_path / "model")
    sizes = {"a": (999, 1499), "b": (1000, 1500)}
    (tmp_path / "photos").mkdir()
    for name, size in sizes.items():
        Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    assert encode_files([tmp_path / "photos"], tmp_path / "z", tmp_path / "model").encoded == 2
    for picture in decode_files([tmp_path / "z"], tmp_path):
        with Image.open(picture) as back:
            assert back.size == sizes[picture.stem][::-1]
