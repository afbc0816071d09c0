"""The options about publishing on the Hub, during and after a run."""

from dataclasses import dataclass

from flip_hf.console.fields import check_options, option, require
from flip_hf.console.ranges import integer


@dataclass
class HubArguments:
    """Publishing during and after the run; the first three are named as in Transformers' TrainingArguments."""

    push_to_hub: bool = option(False, "push the model to the Hub every --hub_push_samples and at the end")
    hub_model_id: str | None = option(
        None, "owner/name on the Hub; the name of --output_dir, under your account, if not given"
    )
    hub_private_repo: bool = option(True, "make a new repository private; False makes it public")
    hub_push_samples: int = option(
        64_000_000, "samples between pushes; 0: only at the end", integer(0, note="0 pushes only at the end")
    )
    export_clip: bool = option(False, "push a stock CLIPModel where the model can be one")

    def __post_init__(self):
        check_options(self)
        for name in ("hub_model_id", "export_clip"):
            require(self.push_to_hub or not getattr(self, name), f"--{name} needs --push_to_hub; give that too.")
