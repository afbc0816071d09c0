"""A run's pushes to the Hub, checked before it begins."""

from pathlib import Path

from accelerate import Accelerator

from flip_hf.hub.pusher import Pusher
from flip_hf.modeling.clip_flip import clip_config_from_flip
from flip_hf.modeling.configuration_flip import FlipConfig
from flip_hf.training.arguments import Arguments


def check_publishing(arguments: Arguments, config: FlipConfig) -> None:
    """Looks whether what the run trains can be what is to be published.

    Raises:
        ValueError: it is to be a CLIPModel, and cannot be one; the message names the switches in the way.
    """
    if not arguments.hub.export_clip:
        return
    if not arguments.objective.contrasts:
        raise ValueError("--export_clip: what --objective reconstruction trains is no CLIPModel. Push without it.")
    clip_config_from_flip(config)


def begin_pushing(arguments: Arguments, accelerator: Accelerator) -> Pusher | None:
    """The main process's pusher, with its repository created; None elsewhere, and where nothing is to be pushed.

    Raises:
        HubRefused: the Hub would not take it, and only the user can mend that.
    """
    hub = arguments.hub
    if not hub.push_to_hub or not accelerator.is_main_process:
        return None
    output_dir = Path(arguments.run.output_dir)
    repo_id = hub.hub_model_id or output_dir.resolve().name
    pusher = Pusher(output_dir, repo_id, private=hub.hub_private_repo, export_clip=hub.export_clip)
    pusher.begin()
    return pusher
