"""What all sections of a recipe have in common."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from qsurgeon.recipe.select import check_pattern

PatternText = Annotated[str, AfterValidator(check_pattern)]


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
