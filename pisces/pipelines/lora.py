"""LoRA adapters of a pipeline's denoisers in diffusers' own files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pisces.pipelines.files import whole_dir

if TYPE_CHECKING:
    from pisces.pipelines.base import PipelineAdapter


def save_lora(adapter: PipelineAdapter, path: str | Path) -> Path:
    """Write the LoRA adapters: see :meth:`PipelineAdapter.save_lora`."""
    from peft.utils import get_peft_model_state_dict

    configs: dict[str, Any] = {name: getattr(part, "peft_config", None) for name, part in adapter.denoisers.items()}
    without = [name for name, config in configs.items() if not config]
    if without:
        raise ValueError(f"save_lora: the {without[0]} has no LoRA adapter. Add one first, or save_pretrained.")
    with whole_dir(path) as partial:
        for name, module in adapter.denoisers.items():
            model: Any = module
            lora = next(iter(configs[name]))  # "default" of prepare, "default_0" of load_lora
            if not hasattr(adapter.pipe, "save_lora_weights"):
                model.save_lora_adapter(str(partial), adapter_name=lora)
                continue
            adapter.pipe.save_lora_weights(
                str(_folder(partial, name)),
                transformer_lora_layers=get_peft_model_state_dict(model, adapter_name=lora),
                # Without it the loader takes alpha = rank.
                transformer_lora_adapter_metadata=configs[name][lora].to_dict(),
            )
    return Path(path)


def load_lora(adapter: PipelineAdapter, file: str | Path) -> None:
    """Load LoRA files into all denoisers: see :meth:`PipelineAdapter.load_lora`."""
    file = Path(file)
    missing = [f for name in adapter.denoisers if not (f := _folder(file.parent, name) / file.name).is_file()]
    if missing:  # half a LoRA would be another model than the one that was trained
        names = " and ".join(adapter.denoisers)
        raise FileNotFoundError(f"load_lora: no such file: {str(missing[0])!r}, expected one for {names}.")
    for name, module in adapter.denoisers.items():
        options = {"weight_name": file.name, "local_files_only": True}
        folder = str(_folder(file.parent, name))
        try:
            if not hasattr(adapter.pipe, "load_lora_weights"):
                model: Any = module
                model.load_lora_adapter(folder, prefix=None, **options)
            elif name == "transformer":
                adapter.pipe.load_lora_weights(folder, **options)
            else:
                adapter.pipe.load_lora_weights(folder, load_into_transformer_2=True, **options)
        except RuntimeError as error:  # torch lists every tensor whose shape differs
            raise ValueError(f"load_lora: the LoRA {str(file)!r} is of another model than this pipeline.") from error
        if not getattr(module, "peft_config", None):  # diffusers only warns: samples would be the base's
            raise ValueError(f"load_lora: {str(file)!r} holds no LoRA for this pipeline's {name}.")


def _folder(folder: Path, name: str) -> Path:
    """Where the file of a denoiser is: diffusers' files name the model that they are loaded into ``transformer``."""
    return folder if name == "transformer" else folder / name
