"""Joins the WebUI and the package: routes, tab, settings. Executed again by every "Reload UI"."""

import logging

import gradio as gr
from modules import script_callbacks, shared

from lora_trainer import requirements

log = logging.getLogger("lora_trainer")
SECTION = ("lora_trainer", "LoRA trainer")
TITLE, TAB_ID = "Train LoRA", "lora_trainer"


def start():
    """The host and its job manager, or the sentence that says why there are none."""
    problem = requirements.problem()
    if problem is not None:
        return None, None, problem
    try:
        from lora_trainer import jobs
        from lora_trainer.host.select import current_host

        host = current_host()
        return host, jobs.manager(host), None
    except Exception as error:
        log.exception("the LoRA trainer could not start")
        return None, None, requirements.problem_after(error)


def on_app_started(demo, app):
    host, manager, problem = start()
    if problem is not None:
        print(f"LoRA trainer: {problem}")
        return
    try:
        from lora_trainer import api

        api.add_routes(app, manager, host)
    except Exception:
        log.exception("the LoRA trainer's routes could not be added")


def on_ui_tabs():
    host, manager, problem = start()
    if problem is None:
        try:
            from lora_trainer import ui

            return [(ui.create_tab(host, manager), TITLE, TAB_ID)]
        except Exception as error:
            log.exception("the tab of the LoRA trainer could not be made")
            problem = requirements.problem_after(error)
    with gr.Blocks(analytics_enabled=False) as tab:
        gr.Markdown(f"### Training is not possible yet\n\n{problem}")
    return [(tab, TITLE, TAB_ID)]


def on_ui_settings():
    try:
        from lora_trainer.ui.settings import OPTIONS
    except ImportError:
        return  # the tab says which package is missing

    for option in OPTIONS:
        component, arguments = None, None  # a checkbox, by the default's type
        if option.choices:
            component, arguments = gr.Radio, {"choices": list(option.choices)}
        elif option.lines:
            component, arguments = gr.Textbox, {"lines": option.lines}
        info = shared.OptionInfo(option.default, option.label, component, arguments, section=SECTION)
        shared.opts.add_option(option.key, info)


def on_script_unloaded():
    """Nothing to end: jobs belong to the server and go on, whatever becomes of the page."""


script_callbacks.on_app_started(on_app_started)
script_callbacks.on_ui_tabs(on_ui_tabs)
script_callbacks.on_ui_settings(on_ui_settings)
script_callbacks.on_script_unloaded(on_script_unloaded)
