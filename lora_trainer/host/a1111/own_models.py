"""A1111's own models, off the device and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_trainer.devices import indexed
from lora_trainer.host.clearing import OwnModels, real_tensors
from lora_trainer.host.lending import loaded_model


class A1111OwnModels(OwnModels):
    """See ``OwnModels``. With --medvram the parts lie in main memory anyway, but for the one that was used last."""

    def __init__(self, webui: Any):
        self._webui = webui
        self._sent_away: list[Any] = []

    def send_away(self) -> None:
        sd_models, device = self._webui.sd_models, indexed(self._webui.devices.device)
        for sd_model in sd_models.model_data.loaded_sd_models:
            if any(parameter.device == device for parameter in sd_model.parameters()):
                sd_models.send_model_to_cpu(sd_model)
                self._sent_away.append(sd_model)

    def bring_back(self) -> None:
        sd_models, sent_away = self._webui.sd_models, self._sent_away
        self._sent_away = []
        for sd_model in sent_away:
            # With --medvram the parts are called to the device when they run.
            if not sd_model.lowvram and sd_model in sd_models.model_data.loaded_sd_models:
                sd_models.send_model_to_device(sd_model)
        self._webui.devices.torch_gc()

    def tensors(self) -> dict[str, Tensor]:
        sd_model = loaded_model(self._webui)
        return {} if sd_model is None else real_tensors(sd_model.state_dict())

    def load_again(self) -> None:
        sd_models, sd_model = self._webui.sd_models, loaded_model(self._webui)
        with sd_models.SkipWritingToConfig():
            sd_models.reload_model_weights(sd_model, sd_model.sd_checkpoint_info, forced_reload=True)
