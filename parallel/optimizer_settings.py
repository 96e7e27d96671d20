"""The optimizer's settings. A run's configuration adds the learning rate to them and passes them on as they are. Needs no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class OptimizerSettings(BaseModel):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    weight_decay: float = Field(ge=0, description="decoupled; vectors (norms, biases) are not decayed")
    betas: tuple[float, float] = Field(strict=False, description="decay of the first and second moment")
    eps: float = Field(gt=0, description="added to the root of the second moment")
    gradient_clip: float = Field(gt=0, description="largest global gradient norm")

    @model_validator(mode="after")
    def _betas_are_decays(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: expected two numbers in [0, 1)")
        return self
