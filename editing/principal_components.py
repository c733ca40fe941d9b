"""Features as colours: their first three principal components (Plug-and-Play, Tumanyan et al., CVPR 2023, figure 3)."""

import torch


def principal_components(features: torch.Tensor, count: int = 3) -> torch.Tensor:
    """Coordinates of `features` [N, C] along their `count` directions of greatest variance: [N, count] fp32.

    Each direction's sign is that which makes its largest entry positive. Directions beyond the C there are give 0.
    """
    centred = features.double() - features.double().mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    directions = directions[:, -count:].flip(-1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    coordinates = centred @ (directions * largest.sign())
    return torch.nn.functional.pad(coordinates, (0, count - coordinates.shape[1])).float()


def as_colours(coordinates: torch.Tensor) -> torch.Tensor:
    """Each column of [N, 3] stretched to 0..1; a constant one becomes 0.5."""
    low, high = coordinates.aminmax(dim=0)
    spread = high - low
    return torch.where(spread > 0, (coordinates - low) / spread.clamp(min=1e-12), 0.5)
