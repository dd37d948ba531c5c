"""The noise of a live model: give it to its norms, and say what they have."""

from collections.abc import Mapping

from torch import nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers.noise import Noise, Strength, add_noise, noisy_norms, refused
from qsurgeon.surgery.inventory import inventory, plain_model


def install(model: nn.Module, noise: Noise, places: Mapping[str, str] | None = None) -> None:
    """Give the norms of ``model`` that ``noise`` names their noise, in place; nothing is changed unless all can be.

    ``places``: under which name of ``noise`` each module is, by its name in ``model``; without it, under its own.

    Raises: SurgeryError for a module that is missing or can have no noise, or has other noise already.
    """
    modules = {one.name: one for one in inventory(model)}
    chosen = places if places is not None else {name: name for name in noise.modules}
    missing = [name for name in chosen if name not in modules]
    if missing:
        raise SurgeryError(f"the model has no norm {missing[0]} ({len(missing)} of {len(chosen)} are missing)")
    norms = {name: model.get_submodule(modules[name].path) for name in chosen}
    for name, norm in norms.items():
        why = refused(norm)
        if why is not None:
            raise SurgeryError(f"{name} cannot have noise: {why}")
    strength = Strength(**noise.model_dump(exclude={"modules"}))
    for name, norm in norms.items():
        add_noise(norm, strength, noise.modules[chosen[name]], chosen[name])


def noise_in(model: nn.Module) -> Noise | None:
    """Return the noise that the norms of ``model`` have now, under names relative to it; None if none has any.

    Raises: SurgeryError if they are not of one recipe.
    """
    _, root = plain_model(model)
    norms = noisy_norms(root)
    if not norms:
        return None
    strengths = dict.fromkeys(norm.noise.strength for norm in norms.values())
    if len(strengths) > 1:
        raise SurgeryError(f"norms have noise of several recipes ({'; '.join(map(str, strengths))}); expected one")
    found = {one.name: norms[one.path] for one in inventory(root) if one.path in norms and not one.adapter}
    return Noise(
        **next(iter(strengths)).model_dump(), modules={name: one.noise.multiplier for name, one in found.items()}
    )
