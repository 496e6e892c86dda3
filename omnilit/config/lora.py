"""`model.lora`: adapters of low rank, trained beside a model that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraArguments:
    """What is adapted and how; names are matched as `peft` matches them.

    Args:
        enable: Freeze the model, and train adapters beside its matrices.
        rank: Of every adapter.
        alpha: Strength: what an adapter adds is scaled by alpha / rank.
        use_rslora: Scale by alpha / sqrt(rank) instead.
        dropout: Share of an adapter's inputs that are left out; 0 where parameters are adapted.
        target_modules: Ends of names of the linear layers to adapt, such as q_proj; one regular
            expression for whole names; or all-linear, which is what peft takes it for: in models
            with experts also these and the router.
        exclude_modules: Ends of names, or a regular expression, of layers that are not adapted.
        target_parameters: Ends of names of parameters to adapt that are no linear layer, such as
            mlp.experts.gate_up_proj.
        modules_to_save: Ends of names of modules that are trained whole and saved beside adapters.
        adapter_path: Folder of a peft adapter to start from; it must have been made with the same
            settings.
    """

    enable: bool = False
    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    adapter_path: str | None = None
