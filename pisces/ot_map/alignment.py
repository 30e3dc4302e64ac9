"""What is done to a text and a video embedding before their cosine is the quality reward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pisces.video import atomic_path

Kind = Literal["none", "mean_shift", "center", "ot", "center_ot"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FORMAT = "pisces-alignment-1"


class NeuralOTMap(nn.Module):
    """The transport map T of the paper: an MLP dim - hidden - hidden - dim_out, hidden layers Linear, ReLU, LayerNorm.

    The same network with `dim_out` = 1 is the potential f. Parameters are named net.0, net.2, net.3, net.5 and net.6,
    as in the checkpoints of the paper's authors.

    Args:
        dim: width of the embeddings.
        hidden: width of the two hidden layers; the paper has 1024 for dim 512.
        dim_out: width of the result; None is dim.

    Example:
        >>> NeuralOTMap(32, hidden=64)(torch.zeros(5, 32)).shape
        torch.Size([5, 32])
    """

    def __init__(self, dim: int, hidden: int = 1024, dim_out: int | None = None) -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.net = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.ReLU(),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, dim if dim_out is None else dim_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim_out], not normalised."""
        return self.net(x)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, source: str = "state dict") -> NeuralOTMap:
        """Build a map of the sizes that the tensors have.

        Args:
            state: net.0.weight and so on.
            source: where it is from, for the message.

        Raises:
            ValueError: other keys or shapes than those of this network.
        """
        first = state.get("net.0.weight")
        if not isinstance(first, Tensor) or first.dim() != 2:
            raise ValueError(
                f"NeuralOTMap: {source} has the keys {sorted(state)[:4]}..., expected net.0.weight, net.2.weight, "
                "net.3.weight, net.5.weight, net.6.weight and their biases."
            )
        hidden, dim = first.shape
        network = cls(dim, hidden)
        try:
            network.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(f"NeuralOTMap: {source} is no map of width {dim} - {hidden}: {error}") from error
        return network


class Alignment(nn.Module):
    """Text and video embeddings, aligned and normalised; the quality reward is their cosine.

    With N the L2 normalisation, y a text and x a video embedding, m_y and m_x their means over the fitting data:

    | kind | text(y) | video(x) |
    |---|---|---|
    | none | N(y) | N(x) |
    | mean_shift | N(N(y) + m_x - m_y) | N(x) |
    | center | N(N(y) - m_y) | N(N(x) - m_x) |
    | ot | N(T(N(y))) | N(x) |
    | center_ot | N(T(N(N(y) - m_y))) | N(N(x) - m_x) |

    Both sides are normalised before anything else, in fitting as in use. `fit_alignment` makes one from data.

    Args:
        kind: a row of the table.
        text_mean: [E] m_y; needed by mean_shift, center and center_ot.
        video_mean: [E] m_x, likewise.
        network: T; needed by ot and center_ot.
        info: JSON-ready facts about the fit, kept with the file.

    Raises:
        ValueError: unknown kind, or a part that the kind needs is missing or does not fit.

    Example:
        >>> alignment = Alignment("center", text_mean=torch.zeros(4), video_mean=torch.ones(4))
        >>> alignment.text(torch.eye(4)).shape
        torch.Size([4, 4])
    """

    text_mean: Tensor | None
    video_mean: Tensor | None

    def __init__(
        self,
        kind: Kind = "none",
        *,
        text_mean: Tensor | None = None,
        video_mean: Tensor | None = None,
        network: NeuralOTMap | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_kind(kind, "Alignment")
        needs_means, needs_map = kind not in ("none", "ot"), kind in ("ot", "center_ot")
        if needs_means and (text_mean is None or video_mean is None):
            raise ValueError(f"Alignment: kind {kind!r} needs text_mean and video_mean. Use fit_alignment.")
        if needs_map and network is None:
            raise ValueError(f"Alignment: kind {kind!r} needs network. Use fit_alignment.")
        self.kind: Kind = kind
        self.network = network if needs_map else None
        self.info: dict[str, Any] = dict(info or {})
        self.register_buffer("text_mean", text_mean if needs_means else None)
        self.register_buffer("video_mean", video_mean if needs_means else None)
        widths = {tuple(m.shape) for m in (self.text_mean, self.video_mean) if m is not None}
        if self.network is not None:
            widths.add((self.network.dim,))
        if len(widths) > 1 or any(len(width) != 1 for width in widths):
            raise ValueError(f"Alignment: its parts have the shapes {sorted(widths)}, expected one width (E,).")
        self.dim: int | None = next(iter(widths))[0] if widths else None

    def text(self, y: Tensor) -> Tensor:
        """Aligned, normalised text embeddings; y [..., E]."""
        y = F.normalize(self._checked(y, "text"), dim=-1)
        if self.text_mean is not None and self.video_mean is not None:
            y = y - self.text_mean
            y = y + self.video_mean if self.kind == "mean_shift" else F.normalize(y, dim=-1)
        if self.network is not None:
            y = self.network(y)
        return F.normalize(y, dim=-1)

    def video(self, x: Tensor) -> Tensor:
        """Aligned, normalised video embeddings; x [..., E]."""
        x = F.normalize(self._checked(x, "video"), dim=-1)
        if self.video_mean is not None and self.kind != "mean_shift":
            x = F.normalize(x - self.video_mean, dim=-1)
        return x

    def _checked(self, z: Tensor, side: str) -> Tensor:
        if self.dim is not None and z.shape[-1:] != (self.dim,):
            raise ValueError(
                f"Alignment.{side}: got shape {tuple(z.shape)}, expected (..., {self.dim}). "
                "Use the encoder with which the alignment was fitted."
            )
        return z

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
            ValueError: neither kind of file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Alignment.load: there is no file {path}. Fit one with fit_alignment.")
        if path.suffix != ".safetensors":
            return cls._load_authors(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"Alignment.load: {path} has format {metadata.get('format')!r}, expected {_FORMAT!r}. "
                "Pass a file that Alignment.save wrote."
            )
        kind = check_kind(metadata["kind"], f"Alignment.load: {path}")
        network = {name.removeprefix("network."): v for name, v in state.items() if name.startswith("network.")}
        return cls(
            kind,
            text_mean=state.get("text_mean"),
            video_mean=state.get("video_mean"),
            network=NeuralOTMap.from_state_dict(network, source=str(path)) if network else None,
            info=json.loads(metadata["info"]),
        )

    @classmethod
    def _load_authors(cls, path: Path) -> Alignment:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"Alignment.load: {path} is no torch file of tensors: {error}") from error
        if isinstance(state, Mapping) and isinstance(state.get("T"), Mapping):
            state = state["T"]
        named = isinstance(state, Mapping) and all(isinstance(k, str) for k in state)
        if not named or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(
                f"Alignment.load: {path} holds a {type(state).__name__} of other things, expected named tensors."
            )
        network = NeuralOTMap.from_state_dict({k: v.float() for k, v in state.items()}, source=str(path))
        return cls("ot", network=network, info={"source": path.name})


def check_kind(kind: str, who: str) -> Kind:
    """The kind, if it is one."""
    for known in KINDS:
        if kind == known:
            return known
    raise ValueError(f"{who}: kind is {kind!r}, expected one of {', '.join(KINDS)}.")
