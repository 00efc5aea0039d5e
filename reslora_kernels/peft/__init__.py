"""ResLoRA as a method of PEFT, for whatever speaks ``PeftModel``. Importing this registers it under ``RESLORA``.

    from peft import get_peft_model
    from reslora_kernels.peft import ResLoRAPeftConfig

    model = get_peft_model(model, ResLoRAPeftConfig(target_modules=["q_proj", "v_proj"], shortcut="block"))

The layers, chains, merges and kernels are those of ``apply_reslora``; this only holds them as PEFT holds its own.
"""

import peft
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

if not hasattr(BaseTuner, "_get_adapter_state_dict"):  # a save would not pass by what refuses an unsound adapter
    raise ImportError(
        "reslora_kernels.peft needs PEFT 0.21 or newer, whose tuners write their own state; this is "
        f"{peft.__version__}. apply_reslora, export_peft and load_peft_adapter work with this version"
    )

from .config import ResLoRAPeftConfig, extend_peft_types, from_native, to_native
from .layer import ResLoRALayer
from .model import ResLoRAModel

extend_peft_types()
register_peft_method(name="reslora", config_cls=ResLoRAPeftConfig, model_cls=ResLoRAModel)

__all__ = ["ResLoRALayer", "ResLoRAModel", "ResLoRAPeftConfig", "from_native", "to_native"]
