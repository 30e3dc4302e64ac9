"""What is done to a text and a video embedding before their cosine is the quality reward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pisces.ot_map.network import NeuralOTMap
from pisces.tensor_files import read_safetensors, read_tensors
from pisces.video import atomic_path
from pisces_kernels._precision import no_autocast

Kind = Literal["none", "mean_shift", "center", "affine", "procrustes", "ridge", "barycentric", "ot", "center_ot"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NEURAL: tuple[Kind, ...] = ("ot", "center_ot")
PAIRED: tuple[Kind, ...] = ("procrustes", "ridge")  # they need to know which text belongs to which video
LINEAR: tuple[Kind, ...] = ("affine", "procrustes", "ridge")  # a matrix and an offset
_MEANS, _MATRIX = ("text_mean", "video_mean"), ("matrix", "offset")
_PARTS: dict[Kind, tuple[str, ...]] = {
    "none": (),
    "mean_shift": _MEANS,
    "center": _MEANS,
    "affine": _MATRIX,
    "procrustes": _MATRIX,
    "ridge": _MATRIX,
    "barycentric": ("anchors", "potential", "epsilon"),
    "ot": ("network",),
    "center_ot": (*_MEANS, "network"),
}
_WIDTHS = ("text_mean", "video_mean", "matrix", "offset", "anchors")  # parts whose last dimension is E
_FORMAT = "pisces-alignment-1"
_ROWS = 1024  # texts that the barycentric map takes at once: its weights are a row of the anchors each


class Alignment(nn.Module):
    """Text and video embeddings, aligned and normalised; the quality reward is their cosine.

    With N the L2 normalisation, y a text and x a video embedding, m_y and m_x their means over the fitting data:

    | kind | text(y) | video(x) |
    |---|---|---|
    | none | N(y) | N(x) |
    | mean_shift | N(N(y) + m_x - m_y) | N(x) |
    | center | N(N(y) - m_y) | N(N(x) - m_x) |
    | affine, procrustes, ridge | N(N(y) matrix + offset) | N(x) |
    | barycentric | N(sum_j w_j(N(y)) anchors_j) | N(x) |
    | ot | N(T(N(y))) | N(x) |
    | center_ot | N(T(N(N(y) - m_y))) | N(N(x) - m_x) |

    with w_j(y) = softmax_j((potential_j - |y - anchors_j|^2) / epsilon). Both sides are normalised before anything
    else. `fit_alignment` makes one from data.

    Both sides are computed and returned in the wider dtype of the embeddings and of the alignment's own tensors,
    whatever the kind: an alignment in bfloat16 leaves float32 embeddings float32, one in float64 makes them float64.

    Args:
        kind: a row of the table.
        text_mean: [E] m_y; needed by mean_shift, center and center_ot.
        video_mean: [E] m_x, likewise.
        matrix: [E, E]; needed by affine, procrustes and ridge.
        offset: [E], likewise.
        anchors: [n, E] normalised video embeddings; needed by barycentric.
        potential: [n] the potential of their side, in units of the cost, likewise.
        epsilon: [] the regularisation that it belongs to, likewise.
        network: T; needed by ot and center_ot.
        info: JSON-ready facts about the fit, kept with the file.

    Attributes:
        file: the file that it was loaded from; None for one that was made in this process.

    Raises:
        ValueError: unknown kind, or a part that the kind needs is missing or does not fit.

    Example:
        >>> alignment = Alignment("center", text_mean=torch.zeros(4), video_mean=torch.ones(4))
        >>> alignment.text(torch.eye(4)).shape
        torch.Size([4, 4])
    """

    text_mean: Tensor | None
    video_mean: Tensor | None
    matrix: Tensor | None
    offset: Tensor | None
    anchors: Tensor | None
    potential: Tensor | None
    epsilon: Tensor | None

    def __init__(
        self,
        kind: Kind = "none",
        *,
        text_mean: Tensor | None = None,
        video_mean: Tensor | None = None,
        matrix: Tensor | None = None,
        offset: Tensor | None = None,
        anchors: Tensor | None = None,
        potential: Tensor | None = None,
        epsilon: Tensor | None = None,
        network: NeuralOTMap | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.kind: Kind = check_kind(kind, "Alignment")
        self.info: dict[str, Any] = dict(info or {})
        self.file: Path | None = None
        tensors = {
            "text_mean": text_mean,
            "video_mean": video_mean,
            "matrix": matrix,
            "offset": offset,
            "anchors": anchors,
            "potential": potential,
            "epsilon": epsilon,
        }
        needed = _PARTS[self.kind]
        if any(part is None for name, part in {**tensors, "network": network}.items() if name in needed):
            raise ValueError(f"Alignment: kind {kind!r} needs {' and '.join(needed)}. Use fit_alignment.")
        self.network = network if "network" in needed else None
        for name, part in tensors.items():
            self.register_buffer(name, part if name in needed else None)
        self.dim = self._width()

    def _width(self) -> int | None:
        """The width E that all parts have; None where there is no part."""
        parts = {name: getattr(self, name) for name in _WIDTHS if getattr(self, name) is not None}
        widths = {part.shape[-1:] for part in parts.values()}
        if self.network is not None:
            widths.add(torch.Size([self.network.dim]))
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        wanted = {"matrix": 2, "anchors": 2}
        square = self.matrix is None or self.matrix.shape[0] == self.matrix.shape[-1]
        weighted = self.anchors is None or self.potential is None or self.potential.shape == self.anchors.shape[:1]
        if len(widths) > 1 or not square or any(len(s) != wanted.get(name, 1) for name, s in shapes.items()):
            raise ValueError(f"Alignment: its parts have the shapes {shapes}, expected one width (E,) or (E, E).")
        if not weighted:
            raise ValueError("Alignment: potential does not fit anchors, expected one number an anchor.")
        return next(iter(widths))[0] if widths else None

    def text(self, y: Tensor) -> Tensor:
        """Aligned, normalised text embeddings.

        Args:
            y: [..., E] of any length, but not zero.

        Returns:
            [..., E], in the wider dtype of y and the alignment, also inside torch.autocast.

        Raises:
            ValueError: another width than that of the alignment.
        """
        with no_autocast(y.device.type):
            y = F.normalize(self._checked(y, "text"), dim=-1)
            if self.text_mean is not None and self.video_mean is not None:
                y = y - self.text_mean
                y = y + self.video_mean if self.kind == "mean_shift" else F.normalize(y, dim=-1)
            if self.matrix is not None and self.offset is not None:
                y = y @ self.matrix.to(y.dtype) + self.offset
            if self.anchors is not None:
                y = torch.cat([self._barycentre(part) for part in y.reshape(-1, y.shape[-1]).split(_ROWS)]).view_as(y)
            if self.network is not None:
                weights = {name: weight.to(y.dtype) for name, weight in self.network.named_parameters()}
                y = functional_call(self.network, weights, (y,))
            return F.normalize(y, dim=-1)

    def video(self, x: Tensor) -> Tensor:
        """Aligned, normalised video embeddings; x [..., E] and the result as in `text`."""
        x = F.normalize(self._checked(x, "video"), dim=-1)
        if self.video_mean is not None and self.kind != "mean_shift":
            x = F.normalize(x - self.video_mean, dim=-1)
        return x

    def _barycentre(self, y: Tensor) -> Tensor:
        """Mean of the anchors under the plan's row of each y [n, E]."""
        assert self.anchors is not None  # for the type checker
        anchors = self.anchors.to(y.dtype)
        # both are normalised: |y - x|^2 up to rounding, and cdist has no gradient at zero distance
        cost = 2 - 2 * y @ anchors.T
        return ((self.potential - cost) / self.epsilon).softmax(-1) @ anchors

    def _checked(self, z: Tensor, side: str) -> Tensor:
        """z, of the right width and in the wider dtype of z and of all tensors here."""
        if self.dim is not None and z.shape[-1:] != (self.dim,):
            raise ValueError(
                f"Alignment.{side}: got shape {tuple(z.shape)}, expected (..., {self.dim}). "
                "Use the encoder with which the alignment was fitted."
            )
        own = (tensor.dtype for tensor in chain(self.parameters(), self.buffers()))
        return z.to(reduce(torch.promote_types, own, z.dtype))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; kind and info are in its header.

        Raises:
            ValueError: the name does not end in .safetensors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"Alignment.save: got {path.name}, expected a name that ends in .safetensors.")
        metadata = {"format": _FORMAT, "kind": self.kind, "info": json.dumps(self.info)}
        # a file without any tensor has no header to read the kind from, so "none" gets a flag
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(state or {"identity": torch.ones(1)}, temporary, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Load what `save` wrote, or a map of the paper's authors.

        The authors' checkpoints are torch files that hold the map's tensors, either bare (net.0.weight, ...) or under
        "T"; they become kind "ot". Nothing in the file is executed.

        Raises:
            FileNotFoundError: no such file.
            ValueError: neither kind of file, or a damaged one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Alignment.load: there is no file {path}. Fit one with fit_alignment.")
        alignment = cls._load_own(path) if path.suffix == ".safetensors" else cls._load_authors(path)
        alignment.file = path
        return alignment

    @classmethod
    def _load_own(cls, path: Path) -> Alignment:
        state, metadata = read_safetensors(path, "Alignment.load")
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"Alignment.load: {path} has format {metadata.get('format')!r}, expected {_FORMAT!r}. "
                "Pass a file that Alignment.save wrote."
            )
        kind = check_kind(metadata["kind"], f"Alignment.load: {path}")
        network = {name.removeprefix("network."): v for name, v in state.items() if name.startswith("network.")}
        return cls(
            kind,
            **{name: state[name] for name in _PARTS[kind] if name in state},
            network=NeuralOTMap.from_state_dict(network, source=str(path)) if network else None,
            info=json.loads(metadata["info"]),
        )

    @classmethod
    def _load_authors(cls, path: Path) -> Alignment:
        state = read_tensors(path, "Alignment.load", under="T")
        # as DistributedDataParallel names them
        state = {k.removeprefix("module."): v.float() for k, v in state.items()}
        network = NeuralOTMap.from_state_dict(state, source=str(path))
        return cls("ot", network=network, info={"source": path.name})


def check_kind(kind: str, who: str) -> Kind:
    """The kind, if it is one."""
    for known in KINDS:
        if kind == known:
            return known
    raise ValueError(f"{who}: kind is {kind!r}, expected one of {', '.join(KINDS)}.")
