"""The network of the Neural OT map."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class NeuralOTMap(nn.Module):
    """The transport map T of the paper: an MLP dim - hidden - hidden - dim_out, hidden layers Linear, ReLU, LayerNorm.

    The same network with `dim_out` = 1 is the potential f. Parameters are named net.0, net.2, net.3, net.5 and net.6,
    as in the checkpoints of the paper's authors.

    Args:
        dim: width of the embeddings.
        hidden: width of the two hidden layers; the paper has 1024 for dim 512.
        dim_out: width of the result; None is dim.

    Example:
        >>> import torch
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
