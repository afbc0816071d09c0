"""Pushing a run to the Hub, checked before the run begins."""

from pathlib import Path

from accelerate import Accelerator

from flip_hf.hub.pusher import Pusher
from flip_hf.modeling.clip_flip import clip_config_from_flip
from flip_hf.modeling.configuration_flip import FlipConfig
from flip_hf.training.arguments import ObjectiveArguments, RunArguments
from flip_hf.training.hub_arguments import HubArguments


def check_publishing(hub: HubArguments, objective: ObjectiveArguments, config: FlipConfig) -> None:
    """Checks that the run's model can be published in the form asked for.

    Raises:
        ValueError: it cannot become a CLIPModel as asked; the message names the settings in the way.
    """
    if not hub.export_clip:
        return
    if not objective.contrasts:
        raise ValueError("--export_clip: --objective reconstruction does not train a CLIPModel. Push without it.")
    clip_config_from_flip(config)


def begin_pushing(hub: HubArguments, run: RunArguments, accelerator: Accelerator) -> Pusher | None:
    """Makes the main process's pusher and creates its repository; None elsewhere, and where nothing is pushed.

    Raises:
        HubRefused: the Hub refused, and only the user can fix that.
    """
    if not hub.push_to_hub or not accelerator.is_main_process:
        return None
    output_dir = Path(run.output_dir)
    repo_id = hub.hub_model_id or output_dir.resolve().name
    pusher = Pusher(output_dir, repo_id, private=hub.hub_private_repo, export_clip=hub.export_clip)
    pusher.begin()
    return pusher
