"""One video file: read it into a tensor, write a tensor to it.

Frames are float32 tensors [T, C, H, W] in [0, 1], RGB. Everything that is written here is atomic: it is written
under a temporary name in the same folder and renamed, so a killed process leaves the former file or none.

Reading is all or nothing. A file that is missing, is not a video, is damaged, or ends before the end that it
announces raises `VideoReadError` with the path and the reason; there is no partial result. The one thing that cannot
be noticed is a file cut exactly between two pictures in a format that announces neither a count nor a duration
(a fragmented mp4, a live recording).
"""

from __future__ import annotations

import io
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch import Tensor

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
_VIEWING_SIDE = 256  # smallest long side of a video written for viewing, in pixels
INTERPOLATIONS = ("bilinear", "bicubic")
_CACHE_BYTES = 256 * 2**20  # decoded pictures kept while the sampling times are not known yet
_THREADED_PIXELS = 320 * 240  # below this the start of decoder threads costs more than it saves
_ITU601 = 5  # FFmpeg's number of the colour matrix that is used in both directions
_SUBTITLE_LIKE = ("tty", "ansi")  # formats in which FFmpeg renders a text file as a video

Size = int | tuple[int, int]
"""Pixels of a picture: the side of a square, or (height, width)."""


class VideoReadError(ValueError):
    """A video cannot be read completely.

    Args:
        path: the file.
        why: the reason, for a person.
    """

    def __init__(self, path: str | os.PathLike[str], why: str) -> None:
        super().__init__(os.fspath(path), why)
        self.path = Path(path)
        self.why = why

    def __str__(self) -> str:
        return f"cannot read video {str(self.path)!r}: {self.why}"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` that replaces it when the block ends well and is removed when it does not.

    Args:
        path: the final file; missing parent folders are made.

    Yields:
        A path in the same folder to write to.

    Example:
        >>> with atomic_path("/tmp/pisces-scores.json") as temporary:
        ...     temporary.write_text("{}")
        2
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:32]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp makes the file private to its owner; results should be as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def uniform_indices(times: np.ndarray, end: int, n_frames: int) -> np.ndarray:
    """Choose the pictures that are on screen in the middle of `n_frames` equal parts of the playing time.

    Formula: `index[k] = max{i : times[i] <= times[0] + (k + 1/2) (end - times[0]) / n_frames}`, in exact integers.
    At a constant rate that is `floor((k + 1/2) T / n_frames)`; with `n_frames = T` it is every picture once, and with
    `n_frames > T` pictures repeat.

    Args:
        times: [T] int64, increasing: when each picture appears, in ticks.
        end: when the last picture disappears, in ticks.
        n_frames: how many to choose, at least 1.

    Returns:
        [n_frames] int64, nondecreasing indices into `times`.

    Example:
        >>> uniform_indices(np.arange(9), 9, 4).tolist()
        [1, 3, 5, 7]
    """
    targets = (2 * np.arange(n_frames, dtype=np.int64) + 1) * (int(end) - int(times[0]))
    index = np.searchsorted(2 * n_frames * (times - times[0]), targets, side="right") - 1
    return np.clip(index, 0, len(times) - 1)


@dataclass(frozen=True)
class _Source:
    """A video's name, and its bytes unless they are in the file of that name."""

    path: Path
    content: bytes | None = None


def read_video(
    source: str | os.PathLike[str] | bytes,
    *,
    n_frames: int | None = None,
    size: Size | None = None,
    interpolation: str = "bilinear",
    name: str | os.PathLike[str] = "bytes",
) -> Tensor:
    """Read a video as a tensor.

    Pictures are sampled uniformly in playing time (`uniform_indices`), so a variable frame rate is honoured. A file
    whose presentation times are missing or repeated is sampled by picture number instead. A rotation that a camera
    noted in the file is applied.

    Args:
        source: path, or content, of any video that FFmpeg decodes; only the first video track is read, and only local
            files.
        n_frames: pictures to sample; pictures repeat where the video has fewer. None reads them all.
        size: output (height, width), one number for a square: the video is resized to just cover it (antialiased),
            then the centre is cropped. None keeps the video's size.
        interpolation: of the resizing, "bilinear" or "bicubic"; what overshoots [0, 1] is cut off.
        name: what errors call a video that is given by its content.

    Returns:
        frames [T, 3, H, W] float32 in [0, 1].

    Raises:
        VideoReadError: the file is missing, not a video, damaged or cut off.
        ValueError: `n_frames` or a side of `size` is below 1, or another interpolation.

    Example:
        >>> _ = write_video("/tmp/pisces-example.mp4", torch.rand(9, 3, 32, 32))
        >>> read_video("/tmp/pisces-example.mp4", n_frames=4, size=(16, 24)).shape
        torch.Size([4, 3, 16, 24])
    """
    if n_frames is not None and n_frames < 1:
        raise ValueError(f"read_video: n_frames is {n_frames}, expected at least 1 or None.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"read_video: interpolation is {interpolation!r}, expected {' or '.join(INTERPOLATIONS)}.")
    target = (size, size) if isinstance(size, int) else size
    if target is not None and min(target) < 1:
        raise ValueError(f"read_video: size is {size}, expected at least 1 pixel a side or None.")
    video = _source_of(source, name)
    reformatter = VideoReformatter()

    def to_tensor(frame: Any) -> Tensor:
        return _to_tensor(frame, target, interpolation, reformatter)

    if n_frames is None:
        pictures = [to_tensor(frame) for frame, _ in _decode(video)]
    else:
        times, end, cache = _times(video)
        index = uniform_indices(times, end, n_frames)
        wanted = set(index.tolist())
        frames = cache if cache is not None else (frame for frame, _ in _decode(video))
        chosen = {i: to_tensor(frame) for i, frame in enumerate(frames) if i in wanted}
        pictures = [chosen[i] for i in index.tolist()]

    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{w}x{h}" for _, h, w in shapes))
        raise VideoReadError(video.path, f"its picture size changes ({sizes}); give `size` to bring them to one")
    return torch.stack(pictures)


def read_pictures(
    source: str | os.PathLike[str] | bytes, *, name: str | os.PathLike[str] = "bytes"
) -> Iterator[Tensor]:
    """Read all pictures of a video one after the other: however long it is, it takes the memory of a few.

    Args:
        source: as of `read_video`.
        name: as of `read_video`.

    Yields:
        [3, H, W] float32 in [0, 1], all of one size.

    Raises:
        VideoReadError: as `read_video`; of a file that is cut off, after its pictures were given.

    Example:
        >>> _ = write_video("/tmp/pisces-example.mp4", torch.rand(9, 3, 32, 32))
        >>> sum(1 for _ in read_pictures("/tmp/pisces-example.mp4"))
        9
    """
    video, reformatter = _source_of(source, name), VideoReformatter()
    shape: torch.Size | None = None
    for frame, _ in _decode(video):
        picture = _to_tensor(frame, None, "bilinear", reformatter)
        shape = shape or picture.shape
        if picture.shape != shape:
            sizes = ", ".join(f"{w}x{h}" for _, h, w in (shape, picture.shape))
            raise VideoReadError(video.path, f"its picture size changes ({sizes})")
        yield picture


def _source_of(source: str | os.PathLike[str] | bytes, name: str | os.PathLike[str]) -> _Source:
    """The content under its name, or a file that is there."""
    if isinstance(source, bytes):
        return _Source(Path(name), source)
    path = Path(source)
    if not path.is_file():
        raise VideoReadError(path, "it is a folder, not a file" if path.is_dir() else "no such file")
    return _Source(path)


def _times(video: _Source) -> tuple[np.ndarray, int, list[Any] | None]:
    """Return when each picture appears, when the last one ends, and the pictures themselves where they are few."""
    times: list[int | None] = []
    last_duration = 0
    cache: list[Any] | None = []
    cached_bytes = 0
    for frame, duration in _decode(video):
        times.append(frame.pts)
        last_duration = duration
        if cache is not None:
            cached_bytes += sum(plane.buffer_size for plane in frame.planes)
            cache.append(frame)
            if cached_bytes > _CACHE_BYTES:  # too long to hold: the caller decodes a second time
                cache = None
    ticks = [t for t in times if t is not None]
    if len(ticks) < len(times) or any(b <= a for a, b in itertools.pairwise(ticks)):
        return np.arange(len(times), dtype=np.int64), len(times), cache
    if last_duration <= 0:
        last_duration = max(1, round((ticks[-1] - ticks[0]) / max(1, len(ticks) - 1)))
    return np.asarray(ticks, dtype=np.int64), ticks[-1] + last_duration, cache


def _decode(video: _Source) -> Iterator[tuple[Any, int]]:
    """Yield (picture, its duration in ticks) in order of presentation; raise VideoReadError unless all can be had."""
    path, n_decoded = video.path, 0
    try:
        # The whitelist keeps playlists from fetching over a network; "file:" keeps FFmpeg from taking a colon in
        # the name for a protocol. Content needs no protocol at all: a playlist in a shard opens no file either.
        source = f"file:{path}" if video.content is None else io.BytesIO(video.content)
        options = {"protocol_whitelist": "file" if video.content is None else "none"}
        container = av.open(source, options=options, metadata_errors="replace")
        with container:
            if container.format.name in _SUBTITLE_LIKE:
                raise VideoReadError(path, "it is a text file")
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise VideoReadError(path, "it holds no video track")
            stream = streams[0]
            if stream.codec_context is None:
                raise VideoReadError(path, "its video format is not known to this build of FFmpeg")
            large = stream.width * stream.height > _THREADED_PIXELS
            if large:
                stream.thread_type = "AUTO"
            else:
                stream.codec_context.thread_count = 1
            first = last = None
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise VideoReadError(path, f"the file is cut off or damaged after picture {n_decoded}")
                for frame in packet.decode():
                    n_decoded += 1
                    duration = frame.duration or 0
                    if frame.pts is not None:
                        first, last = frame.pts if first is None else first, frame.pts + duration
                    yield frame, duration
            if n_decoded == 0:
                raise VideoReadError(path, "no picture could be decoded")
            _check_complete(path, container, stream, n_decoded, first, last)
    except (av.FFmpegError, OSError, OverflowError) as error:
        place = f"after picture {n_decoded}" if n_decoded else "not a video, or damaged at its start"
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoReadError(path, f"{reason} ({place})") from error


def _check_complete(
    path: Path, container: Any, stream: Any, n_decoded: int, first: int | None, last: int | None
) -> None:
    """Compare what was decoded with the count and the duration that the file announces."""
    announced = stream.frames
    # An edit list (a phone's trim) legitimately hides pictures of an mp4, whose track duration accounts for that.
    if announced > n_decoded and "mp4" not in container.format.name:
        raise VideoReadError(path, f"the file is cut off: {n_decoded} of {announced} pictures are there")
    if first is None or last is None or n_decoded < 2:
        return
    seconds = float((last - first) * stream.time_base)
    expected = _announced_seconds(container, stream)
    if expected is not None and seconds < expected - max(0.05, 1.5 * seconds / n_decoded):
        raise VideoReadError(path, f"the file is cut off: {seconds:.2f} of {expected:.2f} seconds are there")


def _announced_seconds(container: Any, stream: Any) -> float | None:
    """Return the duration of the video track that the file's header gives, or None."""
    if stream.duration is not None and stream.time_base is not None and "mp4" in container.format.name:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska and WebM, "00:00:03.000000000"
    try:
        hours, minutes, seconds = tag.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


def _to_tensor(frame: Any, size: tuple[int, int] | None, interpolation: str, reformatter: VideoReformatter) -> Tensor:
    """Convert one decoded picture to [3, H, W] float32 in [0, 1], upright, resized and cropped."""
    # One thread: swscale's threads cost 3 ms a picture to start, a hundred times the conversion of a small one.
    rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    picture = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255.0
    quarter_turns = round((frame.rotation or 0) / 90) % 4
    if quarter_turns:
        picture = torch.rot90(picture, quarter_turns, dims=(1, 2))
    if size is None:
        return picture.contiguous()
    height, width = picture.shape[-2:]
    # One side gets its size exactly, the other at least: in whole numbers, so that no rounding leaves a row short.
    if size[0] * width >= size[1] * height:
        new = size[0], max(size[1], round(width * size[0] / height))
    else:
        new = max(size[0], round(height * size[1] / width)), size[1]
    if new != (height, width):
        picture = F.interpolate(picture[None], new, mode=interpolation, antialias=True, align_corners=False)[0]
    top, left = (new[0] - size[0]) // 2, (new[1] - size[1]) // 2
    return picture[:, top : top + size[0], left : left + size[1]].clamp(0.0, 1.0).contiguous()


def cpu_frames(frames: Tensor, who: str, dims: str = "T, 3, H, W") -> Tensor:
    """Frames as they are written to files: on the CPU, detached, float32; what is none in [0, 1] is refused.

    Args:
        frames: floating point in [0, 1], with a tolerance of 0.001.
        who: name for the message.
        dims: its dimensions, for the message too; channels are the third from the end.

    Returns:
        The same numbers.

    Raises:
        ValueError: wrong number of dimensions or channels, not floating point, or out of range.
    """
    n_dims = dims.count(",") + 1
    if frames.ndim != n_dims or frames.shape[-3] != 3 or 0 in frames.shape:
        raise ValueError(f"{who}: frames has shape {tuple(frames.shape)}, expected [{dims}] with no empty axis.")
    if not frames.is_floating_point():
        raise ValueError(f"{who}: frames has dtype {frames.dtype}, expected floating point. Divide by 255.")
    frames = frames.detach().cpu().float()
    low, high = frames.amin().item(), frames.amax().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"{who}: frames has values in [{low:.3g}, {high:.3g}], expected [0, 1]. Clamp or rescale them."
        )
    return frames


def video_bytes(frames: Tensor, *, fps: float = 8.0, lossless: bool = True, scale: int | None = None) -> bytes:
    """Encode frames as an H.264 mp4 in memory; equal frames give equal bytes.

    Args:
        frames: [T, 3, H, W] float in [0, 1].
        fps: pictures a second.
        lossless: True is for data: 4:4:4 with lossless coding, so that only the rounding of the colour conversion is
            lost (at most 3/255, 0.6/255 on average). False is for eyes: 4:2:0, which every browser plays.
        scale: whole-number nearest-neighbour enlargement. None: 1 where lossless, otherwise the smallest that
            brings the long side to 256 pixels. 4:2:0 needs even sides: an odd one is padded by its last row or column.

    Returns:
        The content of an mp4 file.

    Raises:
        ValueError: wrong dimensions, type, range, fps or scale.

    Example:
        >>> len(video_bytes(torch.zeros(9, 3, 32, 32))) < 4096
        True
    """
    frames = cpu_frames(frames, "write_video")
    if not fps > 0:
        raise ValueError(f"write_video: fps is {fps}, expected a positive number.")
    if scale is None:
        scale = 1 if lossless else max(1, -(-_VIEWING_SIDE // max(frames.shape[-2:])))
    if scale < 1:
        raise ValueError(f"write_video: scale is {scale}, expected a whole number of at least 1.")
    pixels = (frames.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    if not lossless and (pixels.shape[2] % 2 or pixels.shape[3] % 2):
        pad = (0, pixels.shape[3] % 2, 0, pixels.shape[2] % 2)
        pixels = F.pad(pixels.float(), pad, mode="replicate").to(torch.uint8)
    return _encode(pixels.permute(0, 2, 3, 1).contiguous().numpy(), fps, lossless)


def _encode(pixels: np.ndarray, fps: float, lossless: bool) -> bytes:
    """Encode pixels [T, H, W, 3] uint8 to an mp4."""
    content = io.BytesIO()
    options = {"crf": "0"} if lossless else {"crf": "16"}
    reformatter = VideoReformatter()
    with av.open(content, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv444p" if lossless else "yuv420p"
        stream.codec_context.colorspace = _ITU601
        stream.codec_context.thread_count = 1  # the number of threads changes x264's output
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = reformatter.reformat(frame, format=stream.pix_fmt, dst_colorspace=_ITU601, threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


def write_video(
    path: str | os.PathLike[str], frames: Tensor, *, fps: float = 8.0, lossless: bool = True, scale: int | None = None
) -> Path:
    """Write frames as an H.264 mp4, atomically.

    Args:
        path: the file to write; missing folders are made.
        frames: [T, 3, H, W] float in [0, 1].
        fps: as in `video_bytes`.
        lossless: as in `video_bytes`: True for data, False for eyes.
        scale: as in `video_bytes`.

    Returns:
        The path.

    Raises:
        ValueError: wrong dimensions, type, range, fps or scale.

    Example:
        >>> write_video("/tmp/pisces-example.mp4", torch.rand(9, 3, 32, 32), lossless=False).name
        'pisces-example.mp4'
    """
    content = video_bytes(frames, fps=fps, lossless=lossless, scale=scale)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)
