"""The small world: one or two coloured shapes that move, their videos and their captions.

Everything that can vary in a video is a `Scenes` record, so that a caption is true or false of a video by construction
and the judge (`pisces.world.judge`) needs no learned part. The world is small enough for two CPU cores and rich enough
for the method: a caption names colour, shape and direction; filler words carry no meaning; a fifth of the combinations
is held out from every generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

FRAMES = 9  # 1 + 4k, what a causal video VAE with a temporal stride of 4 takes
SIZE = 32

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.15, 0.25, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "magenta": (1.0, 0.1, 0.95),
    "cyan": (0.1, 0.95, 0.95),
}
VELOCITY: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COLORS = tuple(PALETTE)
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = tuple(VELOCITY)
FILLERS = tuple(
    "please watch this short cinematic beautiful clip of with high detail stock footage nice 4k trending scene shot "
    "very smooth".split()
)
VOCABULARY = ("[pad]", "[unk]", "[sep]", "a", "and", "moves", *COLORS, *SHAPES, *DIRECTIONS, *FILLERS)

Attribute = Literal["color", "shape", "direction"]
Split = Literal["train", "held_out"]
ATTRIBUTE_VALUES: dict[Attribute, int] = {
    "color": len(COLORS),
    "shape": len(SHAPES),
    "direction": len(DIRECTIONS),
}


@dataclass(frozen=True)
class Scenes:
    """What B videos show; the second object's columns are drawn but unused where `count` is 1.

    Attributes:
        count: [B] long, 1 or 2 objects.
        color: [B, 2] long, index into `COLORS`.
        shape: [B, 2] long, index into `SHAPES`.
        direction: [B, 2] long, index into `DIRECTIONS`.
    """

    count: Tensor
    color: Tensor
    shape: Tensor
    direction: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(self.count[index], self.color[index], self.shape[index], self.direction[index])

    def replace(self, attribute: Attribute, values: Tensor) -> Scenes:
        """A copy in which one attribute has other values."""
        columns = {"color": self.color, "shape": self.shape, "direction": self.direction, attribute: values}
        return Scenes(self.count, **columns)

    def is_object(self) -> Tensor:
        """[B, 2] bool: which of the two columns are really in the video."""
        return torch.stack([torch.ones_like(self.count, dtype=torch.bool), self.count == 2], dim=1)

    @staticmethod
    def cat(parts: list[Scenes]) -> Scenes:
        """Scenes of several records, one after the other."""
        names = ("count", "color", "shape", "direction")
        return Scenes(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def is_held_out(color: Tensor, shape: Tensor, direction: Tensor) -> Tensor:
    """True where the combination is kept from generators: (color + 2 shape + 3 direction) mod 5 = 0."""
    return (color + 2 * shape + 3 * direction) % 5 == 0


def sample_scenes(
    n: int, generator: torch.Generator, *, two_objects: float = 0.0, split: Split | None = None
) -> Scenes:
    """Draw n scenes; the two objects of a scene never share a colour.

    Args:
        n: number of scenes, at least 1.
        generator: source of randomness; the same state gives the same scenes.
        two_objects: probability of a second object, in [0, 1].
        split: "train" or "held_out" keeps to that part of the combinations; None draws from all.

    Returns:
        `Scenes` of n rows.

    Raises:
        ValueError: n below 1, a probability outside [0, 1] or an unknown split.

    Example:
        >>> scenes = sample_scenes(4, torch.Generator().manual_seed(0), split="held_out")
        >>> len(captions(scenes))
        4
    """
    if n < 1:
        raise ValueError(f"sample_scenes: n is {n}, expected at least 1.")
    if not 0 <= two_objects <= 1:
        raise ValueError(f"sample_scenes: two_objects is {two_objects}, expected a probability in [0, 1].")
    if split not in (None, "train", "held_out"):
        raise ValueError(f"sample_scenes: split is {split!r}, expected 'train', 'held_out' or None.")
    count = 1 + (torch.rand(n, generator=generator) < two_objects).long()
    first = _draw_objects(n, generator, split, taken_color=None)
    second = _draw_objects(n, generator, split, taken_color=first[0])
    return Scenes(count, *(torch.stack(pair, dim=1) for pair in zip(first, second, strict=True)))


def _draw_objects(
    n: int, generator: torch.Generator, split: Split | None, taken_color: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One object a scene by rejection; about four of five combinations are in 'train', so this ends quickly."""

    def draw() -> list[Tensor]:
        return [torch.randint(0, k, (n,), generator=generator) for k in ATTRIBUTE_VALUES.values()]

    columns = draw()
    while True:
        held = is_held_out(*columns)
        bad = torch.zeros_like(held) if split is None else (held if split == "train" else ~held)
        if taken_color is not None:
            bad = bad | (columns[0] == taken_color)
        if not bad.any():
            return columns[0], columns[1], columns[2]
        columns = [torch.where(bad, new, old) for new, old in zip(draw(), columns, strict=True)]


def pixel_grid() -> tuple[Tensor, Tensor]:
    """(y, x) coordinates of the pixel centres, both [SIZE, SIZE]."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def coverage(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Soft mask in [0, 1] of a shape: sigmoid(-3 d), d the signed distance to its outline in pixels.

    Args:
        x, y: offsets from the shape's centre, [..., SIZE, SIZE].
        radius: [...], pixels.
        shape: [...] long, index into `SHAPES`; the sizes are chosen so that the three areas are close.

    Returns:
        [..., SIZE, SIZE].
    """
    r, s = radius[..., None, None], shape[..., None, None]
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * r
    circle = torch.sqrt(x * x + y * y) - r
    triangle = torch.maximum(y - 0.65 * r, 0.866 * x.abs() - 0.5 * y - 0.65 * r)
    distance = torch.where(s == 0, square, torch.where(s == 1, circle, triangle))
    return torch.sigmoid(-3 * distance)


def render(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Draw the videos of the scenes; size, speed, place and background grey are random.

    Args:
        scenes: what to draw.
        generator: source of what the caption leaves open.

    Returns:
        frames [B, FRAMES, 3, SIZE, SIZE] float32 in [0, 1].
    """
    b, two = len(scenes), scenes.count == 2

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    alone = ~two[:, None]
    radius = torch.where(alone, uniform(4.4, 6.0, b, 2), uniform(3.0, 3.8, b, 2))
    speed = torch.where(alone, uniform(1.2, 1.7, b, 2), uniform(0.6, 0.8, b, 2))
    # two objects are small, slow and kept to their own half, so that they never cover each other
    halves = torch.stack([uniform(7.0, 8.5, b), uniform(22.5, 24.0, b)], dim=1)
    halves = torch.where((torch.rand(b, generator=generator) < 0.5)[:, None], halves, halves.flip(1))
    x0 = torch.where(alone, uniform(14, 18, b, 2), halves)
    y0 = torch.where(alone, uniform(14, 18, b, 2), uniform(9, 23, b, 2))

    time = torch.arange(FRAMES) - (FRAMES - 1) / 2
    velocity = torch.tensor(list(VELOCITY.values()), dtype=torch.float32)[scenes.direction] * speed[..., None]
    x_t = x0[..., None] + velocity[..., :1] * time  # [B, 2, T]
    y_t = y0[..., None] + velocity[..., 1:] * time
    y, x = pixel_grid()
    mask = coverage(
        x - x_t[..., None, None],
        y - y_t[..., None, None],
        radius[..., None].expand(-1, -1, FRAMES),
        scenes.shape[..., None].expand(-1, -1, FRAMES),
    )
    mask = mask * scenes.is_object()[..., None, None, None]  # [B, 2, T, S, S]

    palette = torch.tensor(list(PALETTE.values()))
    frames = uniform(0.08, 0.22, b, 1, 1, 1, 1).expand(b, FRAMES, 3, SIZE, SIZE)
    for k in range(2):
        cover = mask[:, k, :, None]  # [B, T, 1, S, S]
        frames = frames * (1 - cover) + palette[scenes.color[:, k]][:, None, :, None, None] * cover
    return frames


def captions(scenes: Scenes, generator: torch.Generator | None = None, *, fillers: float = 0.0) -> list[str]:
    """The sentence for every scene: "a red square moves left [and a blue circle moves up]".

    Args:
        scenes: what the videos show.
        generator: needed when `fillers` is not 0.
        fillers: probability that 2 to 7 meaningless words surround the sentence.

    Returns:
        B captions.

    Raises:
        ValueError: `fillers` without a generator.
    """
    if fillers and generator is None:
        raise ValueError("captions: fillers needs a generator. Pass a torch.Generator.")
    sentences = []
    for i in range(len(scenes)):
        parts = [
            f"a {COLORS[scenes.color[i, k]]} {SHAPES[scenes.shape[i, k]]} moves {DIRECTIONS[scenes.direction[i, k]]}"
            for k in range(int(scenes.count[i]))
        ]
        sentence = " and ".join(parts)
        if fillers and float(torch.rand(1, generator=generator)) < fillers:
            n = int(torch.randint(2, 8, (1,), generator=generator))
            words = [FILLERS[j] for j in torch.randint(0, len(FILLERS), (n,), generator=generator).tolist()]
            cut = int(torch.randint(0, n + 1, (1,), generator=generator))
            sentence = " ".join([*words[:cut], sentence, *words[cut:]])
        sentences.append(sentence)
    return sentences


def parse_caption(caption: str) -> Scenes:
    """The scene that a caption of this world describes, fillers ignored; the inverse of `captions`.

    Raises:
        ValueError: the caption has no or more than two objects, or misses an attribute.
    """
    words = [word for word in caption.lower().split() if word not in FILLERS]
    objects = " ".join(words).split(" and ")
    columns: dict[str, list[int]] = {"color": [], "shape": [], "direction": []}
    for text in objects[:2]:
        for name, values in (("color", COLORS), ("shape", SHAPES), ("direction", DIRECTIONS)):
            found = [values.index(word) for word in text.split() if word in values]
            if len(found) != 1 or len(objects) > 2:
                raise ValueError(
                    f"parse_caption: got {caption!r}, expected one or two times 'a COLOR SHAPE moves DIRECTION' "
                    f"joined by 'and', with COLOR of {COLORS}, SHAPE of {SHAPES}, DIRECTION of {DIRECTIONS}."
                )
            columns[name].append(found[0])
    count = len(objects)
    padded = {name: torch.tensor([(values * 2)[:2]]) for name, values in columns.items()}
    return Scenes(torch.tensor([count]), padded["color"], padded["shape"], padded["direction"])


def corrupt_scenes(scenes: Scenes, generator: torch.Generator, p: float) -> Scenes:
    """Replace every attribute with probability p by a random value: captions that lie about their video."""
    for name, k in ATTRIBUTE_VALUES.items():
        values = getattr(scenes, name)
        lie = torch.rand(values.shape, generator=generator) < p
        random = torch.randint(0, k, values.shape, generator=generator)
        scenes = scenes.replace(name, torch.where(lie, random, values))
    return scenes


def flip_attribute(scenes: Scenes, generator: torch.Generator, which: Attribute | None = None) -> Scenes:
    """Change exactly one attribute of one object to another value: the hardest wrong caption.

    Args:
        scenes: the true scenes.
        generator: draws the object, the value and, if `which` is None, the attribute of each scene.
        which: the attribute to change; None draws one a scene.
    """
    b = len(scenes)
    names = list(ATTRIBUTE_VALUES)
    chosen = torch.randint(0, len(names), (b,), generator=generator)
    if which is not None:
        chosen = torch.full((b,), names.index(which))
    second = (torch.rand(b, generator=generator) < 0.5) & (scenes.count == 2)
    target = torch.stack([~second, second], dim=1)  # [B, 2]
    for i, name in enumerate(names):
        k = ATTRIBUTE_VALUES[name]
        values = getattr(scenes, name)
        step = torch.randint(1, k, (b, 1), generator=generator)
        change = target & (chosen == i)[:, None]
        scenes = scenes.replace(name, torch.where(change, (values + step) % k, values))
    return scenes


def corrupt_frames(frames: Tensor, generator: torch.Generator, p: float) -> Tensor:
    """Damage videos as bad footage is: flicker, grain, blur and a mirrored ghost, each with probability p.

    Args:
        frames: [B, T, C, H, W] in [0, 1].
        generator: source of randomness.
        p: probability of each of the four damages, in [0, 1].

    Returns:
        frames of the same shape, in [0, 1].
    """
    b, t = frames.shape[:2]

    def chosen() -> Tensor:
        return (torch.rand(b, generator=generator) < p)[:, None, None, None, None]

    gain = 0.45 + 0.55 * torch.rand(b, t, 1, 1, 1, generator=generator)
    frames = torch.where(chosen(), frames * gain, frames)
    grain = 0.11 * torch.randn(frames.shape, generator=generator)
    frames = torch.where(chosen(), frames + grain, frames)
    blurred = F.avg_pool2d(frames.flatten(0, 1), 5, stride=1, padding=2, count_include_pad=False).view_as(frames)
    frames = torch.where(chosen(), blurred, frames)
    frames = torch.where(chosen(), 0.6 * frames + 0.4 * frames.flip(-1), frames)
    return frames.clamp(0, 1)
