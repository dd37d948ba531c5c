"""The words by which rules say how a layer uses its formats; recipes and layers share them."""

from typing import Literal

Gradient = Literal["ste", "clipped", "none"]  # how a gradient passes the rounding
Phase = Literal["training", "rollout"]  # what a model is being called for
Phases = Literal["both", "training", "rollout"]  # in which of them a layer rounds
SavedInputs = Literal["packed", "full"]  # what a backward pass keeps of an input: codes and scales, or their values
Storage = Literal["master", "packed"]  # of a weight: full precision, rounded in each pass, or its codes and scales
