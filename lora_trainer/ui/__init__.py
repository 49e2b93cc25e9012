"""The Train LoRA tab.

gradio only frames it: each block is HTML written here, and ``javascript/lora_trainer*.js`` brings it to life through
the routes under ``/lora-trainer/v1``. So a page that is reloaded, or open twice, shows what the server knows, the
host's queue is never held, and one source serves every version of gradio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio

    from lora_trainer.host.base import Host
    from lora_trainer.jobs.worker import JobManager

__all__ = ["create_tab"]


def create_tab(host: Host, manager: JobManager) -> gradio.Blocks:
    """The tab's blocks, for the host to show under "Train LoRA"."""
    from lora_trainer.ui import compat, dataset_tab, results_tab, tools_tab, train_tab

    del manager  # the page asks the routes for whatever it shows; nothing of it is fixed when the page is built
    offer_folders = not host.access().hide_paths
    blocks = (
        ("Train", train_tab.create_ui(offer_folders=offer_folders)),
        ("Dataset", dataset_tab.create_ui(offer_folders=offer_folders)),
        ("Runs", results_tab.create_ui()),
        ("Tools", tools_tab.create_ui()),
    )
    return compat.tabbed_page("lora_trainer", blocks)
