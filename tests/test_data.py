"""Reading and writing of videos: round trips, sampling laws, damaged and foreign files."""

from __future__ import annotations

import os
import pickle
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import moving_shapes
from torch import Tensor

from pisces.data import (
    VideoReadError,
    atomic_path,
    read_pictures,
    read_video,
    uniform_indices,
    write_video,
)


def gray_ramp(n_frames: int) -> list[np.ndarray]:
    """Pictures whose brightness tells their number."""
    return [np.full((32, 48, 3), 20 + 200 * t // max(1, n_frames - 1), np.uint8) for t in range(n_frames)]


def encode(
    path: Path,
    pictures: list[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 24,
    pts: list[int] | None = None,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int | None = None,
) -> Path:
    """Write a video as the world outside would: another codec, an audio track, irregular times, a rotation."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, rate)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=48000) if audio else None
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            for k in range(len(pictures) * 48000 // rate // 1024):
                block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                block.rate, block.pts = 48000, 1024 * k
                container.mux(sound.encode(block))
            container.mux(sound.encode(None))
    return path


def noise_pictures(n: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (n, height, width, 3), dtype=np.uint8))


# Round trips


@pytest.mark.parametrize("shape", [(9, 32, 32), (1, 32, 32), (5, 31, 45), (17, 64, 30)])
def test_lossless_round_trip_and_a_lossy_negative_control(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    frames = moving_shapes(*shape)
    error = (read_video(write_video(tmp_path / "a.mp4", frames)) - frames).abs()
    assert error.mean() < 1 / 255
    assert error.max() < 3.5 / 255
    even = shape[1] % 2 == 0 and shape[2] % 2 == 0
    if even:
        lossy = read_video(write_video(tmp_path / "b.mp4", frames, lossless=False, scale=1))
        assert (lossy - frames).abs().mean() > 3 / 255  # the colours of a 32-pixel world do not survive 4:2:0


def test_viewing_form_is_enlarged_by_whole_pixels_and_playable(tmp_path: Path) -> None:
    frames = moving_shapes()
    path = write_video(tmp_path / "a.mp4", frames, lossless=False, fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.codec_context.pix_fmt) == (256, 256, "yuv420p")
        assert stream.average_rate == 8
    back = read_video(path)
    assert (back[:, :, 4::8, 4::8] - frames).abs().mean() < 3 / 255

    odd = write_video(tmp_path / "b.mp4", moving_shapes(3, 31, 33), lossless=False, scale=3)
    assert read_video(odd).shape == (3, 3, 94, 100)  # 93x99, padded to even sides


def test_equal_frames_give_equal_bytes_and_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = moving_shapes()
    first = write_video(tmp_path / "a.mp4", frames).read_bytes()
    assert write_video(tmp_path / "b.mp4", frames).read_bytes() == first

    def broken(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pisces.video.os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        write_video(tmp_path / "a.mp4", 1 - frames)
    assert (tmp_path / "a.mp4").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_atomic_path_keeps_the_former_file_and_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("one")
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode

    def fail_half_way() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of tw")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_text() == "one"
    assert os.listdir(target.parent) == ["x.txt"]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(3, 32, 32), "shape"),
        (torch.zeros(2, 1, 32, 32), "shape"),
        (torch.zeros(0, 3, 32, 32), "empty axis"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "Divide by 255"),
        (torch.full((2, 3, 32, 32), 200.0), "Clamp or rescale"),
        (torch.full((2, 3, 32, 32), float("nan")), "Clamp or rescale"),
    ],
)
def test_frames_that_are_no_video_are_refused(tmp_path: Path, frames: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"write_video: .*{message}"):
        write_video(tmp_path / "a.mp4", frames)
    assert not list(tmp_path.iterdir())


# Sampling in time and space


def test_uniform_indices_laws() -> None:
    for total in (1, 2, 9, 50):
        even = np.arange(total) * 512
        assert uniform_indices(even, total * 512, total).tolist() == list(range(total))
        for n in (1, 3, 8, 64):
            index = uniform_indices(even, total * 512, n)
            assert index.tolist() == [(2 * k + 1) * total // (2 * n) for k in range(n)]
            assert (np.diff(index) >= 0).all()
            shifted = uniform_indices(even + 77, total * 512 + 77, n)
            assert (shifted == index).all()
    # The picture that is on screen for 8 of 10 ticks is the one that is taken most often.
    assert uniform_indices(np.array([0, 1, 9]), 10, 5).tolist() == [1, 1, 1, 1, 2]


def test_sampling_reads_the_wanted_pictures(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", gray_ramp(24))
    everything = read_video(path)
    assert everything.shape == (24, 3, 32, 48)
    assert torch.equal(read_video(path, n_frames=6), everything[[2, 6, 10, 14, 18, 22]])
    assert torch.equal(read_video(path, n_frames=48), everything.repeat_interleave(2, dim=0))
    assert torch.equal(read_video(path, n_frames=1), everything[12:13])


def test_long_videos_are_decoded_twice_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", noise_pictures(10))
    held = read_video(path, n_frames=4)
    monkeypatch.setattr("pisces.video._CACHE_BYTES", 1)
    assert torch.equal(read_video(path, n_frames=4), held)


def test_a_variable_frame_rate_is_sampled_in_time(tmp_path: Path) -> None:
    pictures = gray_ramp(6)
    # Five pictures in the first half second, the last one on screen until the end of the sixth.
    path = encode(tmp_path / "a.mkv", pictures, rate=10, pts=[0, 1, 2, 3, 4, 54], options={"bf": "0"})
    every = read_video(path)
    assert len(every) == 6
    sampled = read_video(path, n_frames=5)
    assert torch.equal(sampled, every[[4, 4, 4, 4, 4]])


def test_repeated_times_fall_back_to_picture_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", gray_ramp(8))
    every = read_video(path)

    class Untimed:
        """A decoded picture whose presentation time is missing or stuck."""

        def __init__(self, frame: av.VideoFrame, pts: int | None) -> None:
            self.frame, self.pts, self.planes = frame, pts, frame.planes

    import pisces.video as video

    decode, convert = video._decode, video._to_tensor
    for pts in (None, 7):
        monkeypatch.setattr(video, "_decode", lambda p, pts=pts: ((Untimed(f, pts), d) for f, d in decode(p)))
        monkeypatch.setattr(video, "_to_tensor", lambda f, *how: convert(f.frame, *how))
        assert torch.equal(read_video(path, n_frames=4), every[[1, 3, 5, 7]])


@pytest.mark.parametrize(("height", "width"), [(90, 162), (161, 91), (32, 32), (20, 33)])
def test_size_resizes_the_short_side_and_crops_the_centre(tmp_path: Path, height: int, width: int) -> None:
    ys, xs = np.mgrid[:height, :width]
    picture = np.stack([xs * 255 / width, ys * 255 / height, 0 * xs], -1).astype(np.uint8)
    path = encode(tmp_path / "a.mkv", [picture] * 2, pix_fmt="yuv444p", options={"crf": "0"})
    frames = read_video(path, size=32)
    assert frames.shape == (2, 3, 32, 32)
    short = min(height, width)
    # A ramp stays the same ramp: the centre is half, the edges are those of the cropped square.
    for channel, axis, side in ((0, 1, width), (1, 0, height)):
        line = frames[0, channel].mean(dim=1 - axis)
        expected = 0.5 + (torch.arange(32) + 0.5 - 16) / 32 * short / side
        assert (line - expected).abs().max() < 0.04, (channel, line, expected)
    if (height, width) == (32, 32):
        assert torch.equal(frames, read_video(path))


@pytest.mark.parametrize(("height", "width"), [(90, 162), (161, 91), (48, 32), (33, 20)])
def test_size_may_be_a_rectangle(tmp_path: Path, height: int, width: int) -> None:
    ys, xs = np.mgrid[:height, :width]
    picture = np.stack([(xs + 0.5) * 255 / width, (ys + 0.5) * 255 / height, 0 * xs], -1).astype(np.uint8)
    path = encode(tmp_path / "a.mkv", [picture] * 2, pix_fmt="yuv444p", options={"crf": "0"})
    for target in ((48, 32), (20, 60), (height, width), (1, 7)):
        frames = read_video(path, size=target)
        assert frames.shape == (2, 3, *target)
        scale = max(target[0] / height, target[1] / width)  # the smallest that covers
        for channel, axis, side, wanted in ((0, 1, width, target[1]), (1, 0, height, target[0])):
            line = frames[0, channel].mean(dim=1 - axis)
            expected = 0.5 + (torch.arange(wanted) + 0.5 - wanted / 2) / (scale * side)
            pixel = 0.5 / (scale * side) + 0.5 / side  # the crop is whole pixels; behind an edge the ramp is flat
            assert (line - expected).abs().max() < 0.01 + pixel, (target, channel, line, expected)
    assert torch.equal(read_video(path, size=(height, width)), read_video(path))
    assert torch.equal(read_video(path, size=24), read_video(path, size=(24, 24)))


def test_the_rotation_of_a_camera_is_applied(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :16] = 255  # a white corner at the upper left
    upright = read_video(encode(tmp_path / "a.mp4", [picture] * 2))
    assert upright.shape[-2:] == (32, 64)
    turned = read_video(encode(tmp_path / "b.mp4", [picture] * 2, rotation=90))  # counterclockwise
    assert turned.shape[-2:] == (64, 32)
    assert turned[0, :, 52:, :12].mean() > 0.9  # now at the lower left
    assert turned[0, :, :40].mean() < 0.05


# Formats and files from outside


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("a.mp4", "libx264", "yuv420p", {}),
        ("a.avi", "mjpeg", "yuvj420p", {}),
        ("a.webm", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
        ("a.mkv", "ffv1", "bgr0", {}),
        ("a.mov", "libx264", "yuv420p10le", {}),
    ],
)
def test_formats_and_their_truncations(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, options: dict[str, str]
) -> None:
    pictures = noise_pictures(24, 50, 162)
    path = encode(tmp_path / name, pictures, codec=codec, pix_fmt=pix_fmt, options=options)
    frames = read_video(path)
    assert frames.shape == (24, 3, 50, 162)
    assert read_video(path, n_frames=8, size=32).shape == (8, 3, 32, 32)
    data = path.read_bytes()
    assert torch.equal(read_video(data), frames)  # the same from memory
    for source in (path, data):
        assert torch.equal(torch.stack(list(read_pictures(source))), frames)  # and one by one
    for fraction in (0.01, 0.2, 0.5, 0.85):
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(data[: int(len(data) * fraction)])
        for n_frames in (None, 2):  # also where fewer pictures are wanted than survive
            with pytest.raises(VideoReadError, match="cut-a"):
                read_video(cut, n_frames=n_frames)
            with pytest.raises(VideoReadError, match="in/memory") as caught:
                read_video(cut.read_bytes(), n_frames=n_frames, name="in/memory")
            assert caught.value.path == Path("in/memory")
        with pytest.raises(VideoReadError, match="cut-a"):
            list(read_pictures(cut))


def test_a_cut_fast_start_mp4_with_sound_is_named(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", noise_pictures(24), audio=True, container_options={"movflags": "faststart"})
    assert len(read_video(path)) == 24
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoReadError, match=r"cut\.mp4.*after picture [1-9]"):
        read_video(cut)


def test_an_edit_list_is_no_truncation(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", gray_ramp(24), options={"g": "12", "bf": "0"})
    trimmed = tmp_path / "trimmed.mp4"
    with av.open(str(source)) as original, av.open(str(trimmed), "w") as copy:
        stream = copy.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.dts is not None:
                # The first 12 pictures come before time zero, so the muxer hides them by an edit list.
                packet.pts -= 12 * 512
                packet.dts -= 12 * 512
                packet.stream = stream
                copy.mux(packet)
    assert len(read_video(trimmed)) == 12


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        block.rate = 48000
        container.mux(stream.encode(block))
        container.mux(stream.encode(None))

    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nhttp://192.0.2.1/a.ts\n#EXT-X-ENDLIST\n"
    cases = {
        tmp_path / "absent.mp4": "no such file",
        tmp_path: "it is a folder",
        write("empty.mp4", b""): "not a video",
        write("text.mp4", b"hello\n" * 99): "not a video",
        write("text.txt", b"hello\n" * 99): "text file",
        write("list.m3u8", playlist): "list.m3u8",  # and nothing is fetched
        sound: "no video track",
    }
    for path, why in cases.items():
        with pytest.raises(VideoReadError, match=why) as caught:
            read_video(path)
        assert caught.value.path == path
        assert str(path) in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_names_that_ffmpeg_would_misread(tmp_path: Path) -> None:
    for name in ("a:b.mp4", "100%.mp4", "q?x=1#y.mp4", "dépôt 1.mp4", "%03d.mp4"):
        frames = moving_shapes(3)
        assert (read_video(write_video(tmp_path / name, frames)) - frames).abs().mean() < 1 / 255


def test_damaged_bytes_never_do_worse_than_an_error(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(write_video(tmp_path / "a.mp4", moving_shapes()).read_bytes())
    victim = tmp_path / "b.mp4"
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), size=int(rng.integers(1, 12))):
            broken[at] = int(rng.integers(256))
        victim.write_bytes(broken[: int(rng.integers(1, len(data) + 1))])
        try:
            frames = read_video(victim, n_frames=4, size=16)
        except VideoReadError:
            refused += 1
        else:
            assert frames.shape == (4, 3, 16, 16)
            assert torch.isfinite(frames).all()
    assert refused > 75


@pytest.mark.parametrize("bad", [{"n_frames": 0}, {"size": 0}, {"n_frames": -3}, {"size": (8, 0)}])
def test_bad_arguments_are_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write_video(tmp_path / "a.mp4", moving_shapes(2))
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(bad))} is {next(iter(bad.values()))}")):
        read_video(path, **bad)
    with pytest.raises(ValueError, match="fps"):
        write_video(path, moving_shapes(2), fps=0)
    with pytest.raises(ValueError, match="scale"):
        write_video(path, moving_shapes(2), scale=0)
