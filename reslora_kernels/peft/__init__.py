"""ResLoRA as a method of PEFT, for whatever speaks ``PeftModel``. Importing this registers it under ``RESLORA``.

    from peft import get_peft_model
    from reslora_kernels.peft import ResLoRAPeftConfig

    model = get_peft_model(model, ResLoRAPeftConfig(target_modules=["q_proj", "v_proj"], shortcut="block"))

The layers, chains, merges and kernels are those of ``apply_reslora``; this only holds them as PEFT holds its own.
"""

from peft.utils import register_peft_method

from .config import ResLoRAPeftConfig, extend_peft_types, from_native, to_native
from .layer import ResLoRALayer
from .model import ResLoRAModel

extend_peft_types()
register_peft_method(name="reslora", config_cls=ResLoRAPeftConfig, model_cls=ResLoRAModel)

__all__ = ["ResLoRALayer", "ResLoRAModel", "ResLoRAPeftConfig", "from_native", "to_native"]
